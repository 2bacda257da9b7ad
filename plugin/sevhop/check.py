"""
Can this guest hop? A tree of named tests, each PASS, FAIL or SKIP; every FAIL says what to do.

A test whose parent has failed is skipped: its answer would mean nothing. Nothing is touched.
"""

from __future__ import annotations

import enum
import os
import re
import secrets
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from sevhop_qmp.errors import SevhopError
from sevhop_qmp.monitor import Monitor
from sevhop_qmp.process import QemuProcess, path_on_disk

from . import command_line
from .guest import Guest, inspect

#: Run states in which a guest can hop; it is in the same one afterwards.
HOPPABLE_STATES = ("running", "paused")
_SEV_BLOCKER = re.compile(r"^SEV(-SNP)?: Migration is not implemented")
_SERVICE = re.compile(r"\.service(/|$)")
_VERSION = re.compile(r"QEMU emulator version (\d+(?:\.\d+)+)")


class Status(enum.Enum):
    """How a test came out."""

    PASS = "pass"
    FAIL = "fail"
    SKIP = "skip"


@dataclass
class Finding:
    """
    One test and what depends on it.

    :ivar detail: what was found, in a few words.
    :ivar remedy: for a FAIL, what to do.
    """

    name: str
    status: Status
    detail: str = ""
    remedy: str = ""
    children: list[Finding] = field(default_factory=list)

    def walk(self, depth: int = 0) -> Iterator[tuple[int, Finding]]:
        """The tree, parents before children, with depth."""
        yield depth, self
        for child in self.children:
            yield from child.walk(depth + 1)

    def failures(self) -> list[Finding]:
        """All that failed."""
        return [finding for _, finding in self.walk() if finding.status is Status.FAIL]

    def as_json(self) -> dict[str, object]:
        """For ``--json``."""
        return {
            "name": self.name,
            "status": self.status.value,
            "detail": self.detail,
            "remedy": self.remedy,
            "children": [child.as_json() for child in self.children],
        }


def passed(name: str, detail: str = "", *children: Finding) -> Finding:
    """A test that passed, with those that depend on it."""
    return Finding(name, Status.PASS, detail, children=list(children))


def failed(name: str, detail: str, remedy: str = "", skipped: tuple[str, ...] = ()) -> Finding:
    """A test that failed, with the names of those that are skipped for it."""
    return Finding(name, Status.FAIL, detail, remedy, [Finding(child, Status.SKIP) for child in skipped])


@dataclass(frozen=True)
class Verdict:
    """What a check came to: the tree, the guest as it was found, and the command line for its destination."""

    tree: Finding
    guest: Guest
    arguments: command_line.Derived


async def bare(
    monitor: Monitor, process: QemuProcess, emulator: str | None = None, command: Sequence[str] | None = None
) -> Verdict:
    """
    Test a guest that runs outside libvirt.

    :param emulator: path of the QEMU that the guest is to go to; by default the file that the source was started from.
    :param command: the destination's whole command line; by default the source's own is used.
    :raises SevhopError: the source cannot be asked or looked into at all.
    """
    source = process.command_line
    if command:
        arguments = command_line.Derived(command[0], list(command[1:]))
    else:
        arguments = command_line.derive(emulator or path_on_disk(process.executable), source[1:], secrets.token_hex(4))
    guest = await inspect(monitor, process)
    return Verdict(_examine(guest, process, arguments), guest, arguments)


def _examine(guest: Guest, process: QemuProcess, arguments: command_line.Derived) -> Finding:
    return passed(
        "guest",
        f"{guest.name}, QEMU {guest.version}, process {process.pid}",
        _process(process),
        _state(guest),
        _memory(guest),
        _context(guest),
        _blockers(guest),
        _jobs(guest),
        _arguments(arguments),
        _emulator(arguments.emulator, process),
    )


def domain(guest: Guest, process: QemuProcess, emulator: str) -> Finding:
    """
    Test the guest of a libvirt domain. libvirt sees to its command line and to where its QEMU runs.

    :param emulator: path of the QEMU that the guest is to go to.
    """
    return passed(
        "guest",
        f"{guest.name}, QEMU {guest.version}, process {process.pid}",
        _state(guest),
        _memory(guest, "set <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>"),
        _context(guest),
        _blockers(guest),
        _jobs(guest),
        _emulator(emulator, process),
    )


def _process(process: QemuProcess) -> Finding:
    try:
        for kind in ("mnt", "net", "pid", "user"):
            if process.namespace(kind) != os.readlink(f"/proc/self/ns/{kind}"):
                return failed(
                    "process",
                    f"it is in another {kind} namespace",
                    "run sevhop in the namespace that the guest's QEMU is in",
                )
        if process.root != "/":
            return failed("process", f"its root directory is {process.root}", "a QEMU after -chroot cannot be replaced")
        for _, path in process.cgroups:
            if _SERVICE.search(path):
                return failed(
                    "process",
                    f"it is in the cgroup of a systemd service ({path}), which ends with it",
                    "run the guest in a scope (systemd-run --scope)",
                )
        os.close(process.duplicate(process.descriptors()[0].number))
    except SevhopError as err:
        return failed("process", err.message, err.hint or "run sevhop as root")
    return passed("process", "can be looked into")


def _state(guest: Guest) -> Finding:
    if guest.state in HOPPABLE_STATES:
        return passed("state", guest.state)
    return failed("state", f"the guest is {guest.state}", "a guest can hop while it runs or is paused")


def _memory(
    guest: Guest,
    remedy: str = "start the guest with -object memory-backend-memfd,id=ram,size=SIZE,share=on "
    "-machine memory-backend=ram",
) -> Finding:
    if not guest.backends:
        return failed("memory", "private to its QEMU", remedy)
    for backend in guest.backends:
        if not backend.share:
            return failed("memory", f"{backend.name} is private to its QEMU ({backend.kind}, share=off)", remedy)
        if backend.kind != "memory-backend-memfd":
            return failed("memory", f"{backend.name} is a {backend.kind or 'nameless backend'}, not memfd", remedy)
    shared = sum(backend.size for backend in guest.backends)
    if shared < guest.memory:
        return failed("memory", "part of it is private to its QEMU", remedy)
    return passed("memory", f"{shared >> 20} MiB in {len(guest.backends)} shared memfd(s)")


def _context(guest: Guest) -> Finding:
    if guest.context.kind == "sev-snp":
        return failed("context", "SEV-SNP", "an SNP context cannot be moved between VMs by any kernel")
    if guest.context.kind == "sev-es":
        return failed(
            "context",
            "SEV-ES: its context can be moved, but nobody has seen such a guest run afterwards",
            "wait for a version of sevhop that was tested on hardware",
        )
    if guest.context.kind == "none":
        return passed("context", "none: there is nothing to move, only the QEMU changes")
    return passed("context", f"{guest.context.kind}, policy {guest.context.policy:#x}")


def _blockers(guest: Guest) -> Finding:
    others = [reason for reason in guest.blockers if not _SEV_BLOCKER.match(reason)]
    if others:
        return failed("blockers", "; ".join(others), "remove the device, or end what blocks, and try again")
    return passed("blockers", "none" if not guest.blockers else "only SEV's own")


def _jobs(guest: Guest) -> Finding:
    if guest.jobs:
        return failed("jobs", ", ".join(guest.jobs), "wait for it to end, or cancel it")
    return passed("jobs", "none under way")


def _arguments(arguments: command_line.Derived) -> Finding:
    if arguments.refused:
        return failed(
            "command line",
            "; ".join(arguments.refused),
            "remove the device, or give the destination's whole command line after --",
        )
    return passed("command line", "everything can be had twice")


def _emulator(emulator: str, process: QemuProcess) -> Finding:
    try:
        version = emulator_version(emulator)
    except SevhopError as err:
        return failed("emulator", err.message, err.hint)
    note = (
        "" if path_on_disk(process.executable) == process.executable else "; the source's binary was replaced on disk"
    )
    return passed("emulator", f"{emulator}, QEMU {version}{note}")


def emulator_version(emulator: str) -> str:
    """
    The version of a QEMU binary, such as ``10.0.2``.

    :raises SevhopError: it cannot be run, or is not QEMU.
    """
    hint = "name a QEMU system emulator with --emulator"
    try:
        done = subprocess.run(
            [emulator, "--version"], capture_output=True, stdin=subprocess.DEVNULL, timeout=20, check=False
        )
    except (OSError, subprocess.SubprocessError) as err:
        raise SevhopError(f"{emulator}: {getattr(err, 'strerror', None) or err}", hint) from err
    found = _VERSION.search(done.stdout.decode(errors="replace"))
    if found is None:
        raise SevhopError(f"{emulator} is not a QEMU system emulator", hint)
    return found[1]
