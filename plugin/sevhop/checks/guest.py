"""
Can this guest hop? Here is what holds for every guest, with libvirt or without. Read-only.

A balloon is not tested, because it does not matter. Where memory is encrypted QEMU itself ignores what the balloon
gives back (``ram_block_discard_disable``), also in the destination; otherwise the pages are discarded for both QEMUs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from sevhop_qmp.errors import SevhopError
from sevhop_qmp.monitor import Commands, Monitor
from sevhop_qmp.process import OnDisk, QemuProcess, path_on_disk

from ..cancellation import meanwhile, shielded
from ..disks import devices, present_disks
from ..disks.block_graph import BlockGraph
from ..disks.images import open_images
from ..guest import command_line, emulator, pid_file, preload
from ..guest.inspection import Guest, inspect
from ..process import cgroup_memory
from ..process.confinement import Confinement
from ..process.launch import inheritable
from . import reboot, registers, sev_host
from .confinement import reason_against
from .registers import Registers
from .result import CheckResult, Status, failed, passed

#: Run states in which a guest can hop; it is in the same one afterwards.
HOPPABLE_STATES = ("running", "paused")
_SEV_BLOCKER = re.compile(r"^SEV(-SNP)?: Migration is not implemented")
_SERVICE = re.compile(r"\.service(/|$)")


class Verdict(NamedTuple):
    """
    The outcome of a check: the tree, the guest and its disks as they were found, and the destination's command line.

    :ivar flag: see :class:`.registers.Registers`.
    """

    tree: CheckResult
    guest: Guest
    disks: BlockGraph
    arguments: command_line.Derived
    flag: int = 0


async def standalone(
    monitor: Monitor, process: QemuProcess, emulator: str | None = None, command: Sequence[str] | None = None
) -> Verdict:
    """
    Test a guest that runs outside libvirt.

    :param emulator: path of the QEMU to hop to; by default the file that the source was started from.
    :param command: the destination's whole command line; by default the source's own is used.
    :raises SevhopError: the source does not answer, or cannot be inspected at all.
    """
    source = process.command_line
    program = command[0] if command else emulator or path_on_disk(process.executable)
    async with meanwhile(shielded(asyncio.to_thread(preload.probe_for, process, program))) as probed:
        guest = await inspect(monitor, process)
        graph, result = await disks(monitor, process)
        if command:
            arguments = command_line.Derived(program, list(command[1:]))
        else:
            argv = command_line.with_machine_type(pid_file.absolute(process, source[1:]), guest.machine_type)
            derived = command_line.derive(program, argv, secrets.token_hex(4))
            arguments = await _with_present_disks(derived, graph, monitor)
        found = await registers.examine(guest, process, monitor)
    tree = _examine(guest, process, arguments, result, found, probed.result)
    return Verdict(tree, guest, graph, arguments, found.flag)


async def _with_present_disks(
    arguments: command_line.Derived, graph: BlockGraph, monitor: Commands
) -> command_line.Derived:
    present = await devices.read(monitor)
    added = await devices.plugged(monitor, arguments.arguments, present)
    if added:
        with contextlib.suppress(SevhopError):  # an emulator that cannot be probed is refused below
            drivers = {str(device["driver"]) for device in added}
            known = await asyncio.to_thread(emulator.properties, arguments.emulator, drivers)
            added = devices.without_unknown(added, known)
    plan = present_disks.adapt(arguments.arguments, graph, present, added)
    return replace(arguments, arguments=plan.arguments, refused=[*arguments.refused, *plan.refused])


def _examine(
    guest: Guest,
    process: QemuProcess,
    arguments: command_line.Derived,
    disks: CheckResult,
    found: Registers,
    probed: Callable[[], emulator.Emulator],
) -> CheckResult:
    readable = library(process)
    return passed(
        "guest",
        f"{guest.name}, QEMU {guest.version}, process {process.pid}",
        _process(process),
        _state(guest),
        _memory(guest),
        _context(guest, process, found, reboot.standalone(guest), own_group=None, sandbox=False),
        _blockers(guest),
        _jobs(guest),
        disks,
        _arguments(arguments),
        _confinement(process, arguments),
        readable,
        emulator_for(arguments.emulator, guest.machine_type, process, readable, guest, probed),
    )


async def disks(monitor: Commands, process: QemuProcess) -> tuple[BlockGraph, CheckResult]:
    """
    Test whether the present disks of a guest can be given to another QEMU.

    :return: the disks, and the result.
    :raises SevhopError: they cannot be inspected.
    """
    graph, images = await open_images(monitor, process)
    images.close()
    return graph, _disks(graph, images.misplaced)


def _disks(graph: BlockGraph, misplaced: Sequence[str]) -> CheckResult:
    name = "disks"
    if misplaced:
        return failed(
            name,
            f"{misplaced[0]} is not the file that the guest has open: it was deleted or replaced, or is a "
            "temporary snapshot",
            "put that file back, eject it if it is a medium (virsh change-media --eject), copy the disk to another "
            "file (virsh blockcopy, QMP drive-mirror), or shut the guest down",
        )
    if graph.exports:
        return failed(
            name,
            f"an export ({graph.exports[0]}) gives other programs access to a disk, and is lost with the old QEMU",
            "remove it (QMP block-export-del)",
        )
    for node in graph.nodes.values():
        where = graph.disk_of(node.name)
        for bitmap in node.bitmaps:
            if not bitmap.persistent and not bitmap.inconsistent:
                return failed(
                    name,
                    f"{where}: the dirty bitmap {bitmap.name or '(without a name)'} is in no image, and is lost "
                    "with the old QEMU",
                    "remove it (QMP block-dirty-bitmap-remove); the next backup is a full one then",
                )
    return passed(name, f"{sum(1 for disk in graph.disks.values() if disk.root)} in use, as their files are on disk")


def domain(
    guest: Guest, process: QemuProcess, path: str, found: Registers, rebooted: list[CheckResult], memory: str
) -> CheckResult:
    """
    Test the guest of a libvirt domain. Its command line and the environment of its QEMU are libvirt's job.

    :param found: see :func:`.registers.examine`.
    :param path: of the QEMU to upgrade to.
    :param rebooted: see :func:`.reboot.domain`.
    :param memory: what to do if its memory cannot be shared.
    """
    readable = library(process)
    return passed(
        "guest",
        f"{guest.name}, QEMU {guest.version}, process {process.pid}",
        _state(guest),
        _memory(guest, memory),
        _context(guest, process, found, rebooted, own_group=sev_host.DOMAIN_GROUP, sandbox=True),
        _blockers(guest),
        _jobs(guest),
        readable,
        emulator_for(path, guest.machine_type, process, readable, guest),
    )


def _process(process: QemuProcess) -> CheckResult:
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
                    f"it is in the cgroup of a systemd service ({path}), which stops when it exits",
                    "run the guest in a scope (systemd-run --scope)",
                )
        os.close(process.duplicate(process.descriptors()[0].number))
    except SevhopError as err:
        return failed("process", err.message, err.hint or "run sevhop as root")
    return passed("process", "can be inspected")


def _state(guest: Guest) -> CheckResult:
    if guest.state in HOPPABLE_STATES:
        return passed("state", guest.state)
    if guest.state == "prelaunch":
        return failed("state", "the guest is prelaunch", "resume it: it was started paused, and has not run yet")
    return failed("state", f"the guest is {guest.state}", "a guest can hop while it runs or is paused")


def _memory(
    guest: Guest,
    hint: str = "start the guest with -object memory-backend-memfd,id=ram,size=SIZE,share=on "
    "-machine memory-backend=ram",
) -> CheckResult:
    if not guest.backends:
        return failed("memory", "private to its QEMU", hint, restart=True)
    for backend in guest.backends:
        if not backend.share:
            found = f"{backend.name} is private to its QEMU ({backend.kind}, share=off)"
            return failed("memory", found, hint, restart=True)
        if backend.kind != "memory-backend-memfd":
            found = f"{backend.name} is a {backend.kind or 'nameless backend'}, not memfd"
            return failed("memory", found, hint, restart=True)
    shared = sum(backend.size for backend in guest.backends)
    if shared < guest.memory:
        return failed("memory", "part of it is private to its QEMU", hint, restart=True)
    return passed("memory", f"{shared >> 20} MiB in {len(guest.backends)} shared memfd(s)")


def _context(
    guest: Guest,
    process: QemuProcess,
    found: Registers,
    rebooted: list[CheckResult],
    *,
    own_group: re.Pattern[str] | None,
    sandbox: bool,
) -> CheckResult:
    context = guest.context
    if context.kind == "sev-snp":
        return failed("context", "SEV-SNP", "an SNP context cannot be moved between VMs by any kernel", sev_host.NAMES)
    if context.kind == "none":
        return passed("context", "none: there is nothing to move, only the QEMU changes")
    host = sev_host.examine(guest, process, own_group=own_group, sandbox=sandbox)
    host += [found.result] if found.result is not None else []
    return passed("context", f"{context.kind}, policy {context.policy:#x}", *host, *rebooted)


def _blockers(guest: Guest) -> CheckResult:
    others = [reason for reason in guest.blockers if not _SEV_BLOCKER.match(reason)]
    if others:
        return failed("blockers", "; ".join(others), "remove the device, or stop what blocks migration, and try again")
    return passed("blockers", "none" if not guest.blockers else "only SEV's own")


def _jobs(guest: Guest) -> CheckResult:
    if guest.jobs:
        return failed("jobs", ", ".join(guest.jobs), "wait for it to end, or cancel it")
    return passed("jobs", "none in progress")


def _arguments(arguments: command_line.Derived) -> CheckResult:
    if arguments.refused:
        return failed(
            "command line",
            "; ".join(arguments.refused),
            "remove the device, or give the whole command line of the new QEMU after --",
        )
    return passed("command line", "everything can be shared")


def _confinement(process: QemuProcess, arguments: command_line.Derived) -> CheckResult:
    name = "confinement"
    try:
        found = Confinement.of(process)
        reason = reason_against(found, arguments.arguments, inheritable(process.environment))
    except SevhopError as err:
        return failed(name, err.message, err.hint or "run sevhop as root")
    if full := cgroup_memory.shortage(found.cgroups, process.private_memory):
        return failed(name, full, "raise the limit (MemoryMax= of its scope) until the hop is over")
    if reason:
        return failed(
            name,
            f"a new QEMU would not be confined as this one is: {reason}",
            "restart the guest with a QEMU that is confined by its command line and its user alone",
        )
    return passed(name, f"user {found.uids[1]}, {'a' if found.filters else 'no'} seccomp filter")


def library(process: QemuProcess) -> CheckResult:
    """Whether the guest's user can read what is preloaded into its next QEMU."""
    name = "library"
    try:
        return passed(name, preload.verify_readable(process.credentials))
    except SevhopError as err:
        return failed(name, err.message, err.hint)


def emulator_for(
    path: str,
    machine_type: str,
    process: QemuProcess,
    readable: CheckResult,
    guest: Guest | None = None,
    probed: Callable[[], emulator.Emulator] | None = None,
) -> CheckResult:
    """
    Test whether a guest can be given to another QEMU.

    :param path: of that.
    :param machine_type: of the guest.
    :param process: the QEMU that has the guest.
    :param readable: see :func:`library`.
    :param guest: what is known of it, if that QEMU is to load its state.
    :param probed: what a probe of that QEMU has returned, or raised; by default it is probed here.
    """
    skipped = ("machine type",)
    if readable.status is not Status.PASS:
        return CheckResult("emulator", Status.SKIP, children=[CheckResult("machine type", Status.SKIP)])
    try:
        new = probed() if probed is not None else preload.probe_for(process, path)
    except preload.NotLoaded as err:
        if machine_type in err.emulator.machine_types:
            return failed("emulator", err.message, err.hint, skipped=skipped)
        new = err.emulator  # without the machine type the hop is refused anyway
    except SevhopError as err:
        return failed("emulator", err.message, err.hint, skipped=skipped)
    was = process.on_disk
    note = "" if was is OnDisk.UNCHANGED else f"; the old QEMU's binary was {was.value} on disk"
    tested = [_machine_type(new, machine_type)]
    if guest is not None and guest.user_networks > 1:
        tested.append(_user_networks(new, guest))
    return passed("emulator", f"{path}, QEMU {new.version}{note}", *tested)


def _machine_type(new: emulator.Emulator, machine_type: str) -> CheckResult:
    if machine_type not in new.machine_types:
        return failed(
            "machine type",
            f"QEMU {new.version} has no {machine_type}",
            "shut the guest down and start it with a machine type that both have, or name another emulator",
        )
    return passed("machine type", machine_type)


def _user_networks(new: emulator.Emulator, guest: Guest) -> CheckResult:
    """Up to 8.2 all of them had the number 0 in a stream; such a QEMU finds nothing that has the second's."""
    name = "user networks"
    numbered = emulator.numbers_user_networks
    if numbered(guest.version) and not numbered(new.version):
        return failed(
            name,
            f"QEMU {new.version} cannot load the state of {guest.user_networks} user networks "
            f"from QEMU {guest.version}",
            "unplug the network cards of type user except for one, or name a QEMU from 8.2 on with --emulator",
        )
    return passed(name, str(guest.user_networks))
