"""
What confines a QEMU and is not on its command line: user, capabilities, no_new_privs, seccomp, label, limits, cgroups.

It is read from the kernel (``/proc/PID``, proc(5)). The command line is no proof: it is read from the QEMU's own
memory, and one that was compromised by its guest may have written something else there. So the destination gets what
the kernel reports of the source (:mod:`sevhop.process.launch`), and what it reports of both is compared before the
guest is stopped.

Not visible from outside, so not compared: securebits, and keepcaps, which execve(2) clears.
"""

from __future__ import annotations

import resource
from pathlib import Path
from typing import NamedTuple, Self

from sevhop_qmp.errors import ProcessError
from sevhop_qmp.invalid_data import invalid
from sevhop_qmp.process import QemuProcess

from . import seccomp_filter
from .in_words import in_words
from .scheduling import cgroup_directory

#: Names of the fields in messages.
_LABELS = {
    "uids": "user",
    "gids": "group",
    "groups": "supplementary groups",
    "umask": "umask",
    "inheritable": "inheritable capabilities",
    "permitted": "permitted capabilities",
    "effective": "effective capabilities",
    "bounding": "bounding set of capabilities",
    "ambient": "ambient capabilities",
    "no_new_privs": "no_new_privs",
    "seccomp": "seccomp mode",
    "filters": "number of seccomp filters",
    "label": "security label",
    "limits": "resource limits",
    "cgroups": "cgroup",
    "core_dump_filter": "core dump filter",
    "personality": "personality",
    "without_huge_pages": "PR_SET_THP_DISABLE",
}
_LIMIT_NAMES = {getattr(resource, name): name for name in reversed(dir(resource)) if name.startswith("RLIMIT_")} | {
    10: "RLIMIT_LOCKS"
}
_HEXADECIMAL = ("inheritable", "permitted", "effective", "bounding", "ambient", "personality")


class Confinement(NamedTuple):
    """
    What the kernel reports of a process.

    :ivar uids: real, effective, saved; ``gids`` likewise.
    :ivar inheritable: capabilities as a bit mask; ``permitted``, ``effective``, ``bounding`` and ``ambient`` likewise.
    :ivar seccomp: 0 none, 1 strict, 2 filters.
    :ivar filters: how many filters there are.
    :ivar label: of the security module; empty without one.
    :ivar limits: (RLIMIT_*, soft, hard), -1 for unlimited.
    :ivar cgroups: (controllers, path) of each hierarchy.
    :ivar core_dump_filter: hexadecimal; which memory a core dump contains.
    :ivar without_huge_pages: it has no transparent huge pages, whatever the host's setting is.
    """

    uids: tuple[int, int, int]
    gids: tuple[int, int, int]
    groups: tuple[int, ...]
    umask: int
    inheritable: int
    permitted: int
    effective: int
    bounding: int
    ambient: int
    no_new_privs: bool
    seccomp: int
    filters: int
    label: str
    limits: tuple[tuple[int, int, int], ...]
    cgroups: tuple[tuple[str, str], ...]
    core_dump_filter: str
    personality: int
    without_huge_pages: bool

    @classmethod
    def of(cls, process: QemuProcess) -> Self:
        """:raises ProcessError: it has exited, access is denied, or the kernel does not report it."""
        status = process.status
        try:
            return cls(
                uids=_three(status["Uid"]),
                gids=_three(status["Gid"]),
                groups=tuple(sorted(int(group) for group in status["Groups"].split())),
                umask=int(status["Umask"], 8),
                inheritable=int(status["CapInh"], 16),
                permitted=int(status["CapPrm"], 16),
                effective=int(status["CapEff"], 16),
                bounding=int(status["CapBnd"], 16),
                ambient=int(status["CapAmb"], 16),
                no_new_privs=status["NoNewPrivs"] == "1",
                seccomp=int(status.get("Seccomp", "0")),
                filters=int(status.get("Seccomp_filters", "0")),  # since Linux 5.9
                label=process.confinement,
                limits=tuple(sorted((number, *limit) for number, limit in process.limits.items())),
                cgroups=tuple(process.cgroups),
                core_dump_filter=process.fact("coredump_filter"),
                personality=int(process.fact("personality") or "0", 16),
                without_huge_pages=status.get("THP_enabled") == "0",
            )
        except (KeyError, ValueError) as err:
            raise ProcessError(f"cannot read the confinement of process {process.pid}: {invalid(err)}") from err

    @property
    def capabilities_after_exec(self) -> int:
        """The permitted capabilities after execve(2) of a program without file capabilities."""
        return self.inheritable | self.bounding if 0 in self.uids[:2] else self.ambient

    def cgroups_to_join(self) -> list[str]:
        """
        Directories of those of its cgroups that this process is not in.

        :raises SevhopError: one of them cannot be found.
        """
        ours = Path("/proc/self/cgroup").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        mine = {tuple(line.split(":", 2)[1:]) for line in ours}
        return [str(cgroup_directory(*one)) for one in self.cgroups if one not in mine]


def differences(source: Confinement, destination: Confinement) -> list[str]:
    """How the confinement of the destination differs from the source's; empty when it does not."""
    found = []
    for name in Confinement._fields:
        ours, theirs = getattr(source, name), getattr(destination, name)
        if name == "limits":
            ours, theirs = _limits(ours), _limits(theirs)
        if ours == theirs:
            continue
        if name in ("limits", "cgroups"):
            ours, theirs = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
        if name in _HEXADECIMAL:
            ours, theirs = f"{ours:#x}", f"{theirs:#x}"
        found.append(f"{_LABELS[name]} is {in_words(theirs)} in the new QEMU, {in_words(ours)} in the old one")
    return found


def filters_lost(source: int, destination: int) -> list[str]:
    """
    What the seccomp filters of a thread of the source forbid, and those of a thread of the destination do not.

    :raises UnknownFilter: the filters cannot be read.
    """
    found = seccomp_filter.lost(seccomp_filter.of(source), seccomp_filter.of(destination))
    if not found:
        return []
    some = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    return [f"the sandbox of the old QEMU forbids system calls that the new QEMU's allows ({some})"]


def _limits(limits: tuple[tuple[int, int, int], ...]) -> list[tuple[str, int, int]]:
    """Those that a QEMU does not change itself: from 9.0 on it raises the soft limit of open files."""

    files = resource.RLIMIT_NOFILE
    return [(_LIMIT_NAMES[number], hard if number == files else soft, hard) for number, soft, hard in limits]


def _three(text: str) -> tuple[int, int, int]:
    real, effective, saved, *_ = map(int, text.split())
    return real, effective, saved
