"""
Memory and cgroups: whether the source's cgroup has memory for a second QEMU, and what happens to its limits.

The destination is in the source's cgroup while both run. When that is out of memory, the kernel should kill the
destination, without effect on the guest. But its ``oom_score_adj`` is relative to the cgroup's limit, and a source may
have more memory mapped than that; a cgroup may have all of its processes killed together (``memory.oom.group``); and
systemd may stop a scope in which one was killed (``OOMPolicy=`` of systemd.scope(5)). So a cgroup without enough memory
is detected before.

The kernel charges a page of shared memory to the cgroup that has touched it first. libvirt creates a new cgroup for
each QEMU of a domain, so after an upgrade the guest's memory is charged to the parent of one that no longer exists.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import QemuProcess

from .scheduling import cgroup_directory

#: Bytes of private memory that a new QEMU with many devices needs at most; one that has more has grown while running.
MOST = 48 << 20
#: By version of cgroup: the limit, what is used, and what of that can be reclaimed without swapping.
_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
    2: ("memory.max", "memory.current", ("inactive_file", "active_file")),
}

_ROOT = Path("/sys/fs/cgroup")
#: Files with a limit, and their content when there is none (Documentation/admin-guide/cgroup-v{1,2}).
_LIMITS = {"memory.max": "max", "memory.high": "max", "memory.low": "0", "memory.min": "0"}
_OLD_LIMITS = ("memory.limit_in_bytes", "memory.soft_limit_in_bytes")
#: In cgroup v1 a limit of at least this is none.
_UNLIMITED = 1 << 62
#: Prefixes of the name of a domain's cgroup, as libvirt or systemd creates it.
OF_DOMAINS = ("machine-qemu", "qemu-")


def shortage(cgroups: Iterable[tuple[str, str]], private: int) -> str:
    """
    Which of these cgroups, or of those above them, has too little memory left; empty when none has.

    :param cgroups: (controllers, path) of a source.
    :param private: bytes of the source's private memory.
    """
    need = min(private, MOST)
    for controllers, path in cgroups:
        if controllers and "memory" not in controllers.split(","):
            continue
        try:
            directory = cgroup_directory(controllers, path)
        except SevhopError:
            continue  # the destination cannot join it either, which is reported elsewhere
        for group in (directory, *directory.parents):
            room = _room(group, 1 if controllers else 2)
            if room is not None and room < need:
                return f"{group} has room for {room >> 20} MiB, and a second QEMU needs about {need >> 20}"
    return ""


def _room(group: Path, version: int) -> int | None:
    """Bytes that a cgroup has left; None if it has no limit, or does not exist."""
    limit, usage, reclaimable = _FILES[version]
    try:
        most = (group / limit).read_text(encoding="ascii").strip()
        if most == "max":
            return None
        statistics = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        freed = sum(int(statistics.get(name, "0")) for name in reclaimable)
        return max(0, int(most) - int((group / usage).read_text(encoding="ascii")) + freed)
    except (OSError, ValueError):
        return None


def unaccounted(process: QemuProcess, root: Path = _ROOT) -> str:
    """
    A note for the report if a domain has memory limits; empty when it has none.

    :raises ProcessError: the process has exited.
    """
    for controllers, path in process.cgroups:
        if controllers == "":
            found = [_limits_of(root, path), _limits_of(root / "unified", path)]
        elif "memory" in controllers.split(","):
            found = [_limits_of(root / "memory", path)]
        else:
            continue
        for names in found:
            if names:
                return (
                    f"the guest's memory stays charged to the parent of its old QEMU's cgroup, so {', '.join(names)} "
                    "of the new one does not count it until the next cold start of the domain"
                )
    return ""


def _limits_of(root: Path, path: str) -> list[str]:
    parts = [part for part in path.split("/") if part]
    own = next((number for number, part in enumerate(parts) if part.startswith(OF_DOMAINS)), None)
    if own is None:
        return []
    found = []
    for end in range(own + 1, len(parts) + 1):
        group = root.joinpath(*parts[:end])
        found += [name for name, none in _LIMITS.items() if _read(group / name) not in ("", none)]
        found += [name for name in _OLD_LIMITS if (text := _read(group / name)).isdigit() and int(text) < _UNLIMITED]
    return list(dict.fromkeys(found))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
