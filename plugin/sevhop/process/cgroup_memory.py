"""
Memory and cgroups: has the source's cgroup room for a second QEMU, and what becomes of its limits.

The destination is in the source's cgroup while both are there. If memory is out, the kernel should end the destination,
and the guest does not notice. But its ``oom_score_adj`` counts in parts of the cgroup's limit, and a source may have
more memory mapped than that; a cgroup may ask for all of its processes to be ended together (``memory.oom.group``); and
systemd may stop a scope in which one was ended (``OOMPolicy=`` of systemd.scope(5)). So a cgroup that has no room is
found before.

The kernel charges a page of shared memory to the cgroup that has touched it first. libvirt makes a new cgroup for each
QEMU of a domain, so after an upgrade the guest's memory is charged to the parent of one that does not exist any more.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import QemuProcess

from .scheduling import cgroup_directory

#: Bytes of its own that a QEMU takes with many devices, and then some; one that has more has lived for long.
MOST = 48 << 20
#: By version of cgroup: the limit, what is used, and what of it can be had back without anybody's memory being taken.
_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
    2: ("memory.max", "memory.current", ("inactive_file", "active_file")),
}

_ROOT = Path("/sys/fs/cgroup")
#: Files with a limit, and what is in them when there is none (Documentation/admin-guide/cgroup-v{1,2}).
_LIMITS = {"memory.max": "max", "memory.high": "max", "memory.low": "0", "memory.min": "0"}
_OLD_LIMITS = ("memory.limit_in_bytes", "memory.soft_limit_in_bytes")
#: What a hierarchy of the first version has for no limit, or more.
_UNLIMITED = 1 << 62
#: How libvirt, or systemd for it, names the cgroup of a domain.
_OF_DOMAINS = ("machine-qemu", "qemu-")


def shortage(cgroups: Iterable[tuple[str, str]], private: int) -> str:
    """
    Which of these cgroups, or of those above them, is too full; empty when none is.

    :param cgroups: (controllers, path) of a source.
    :param private: bytes that the source has for itself.
    """
    need = min(private, MOST)
    for controllers, path in cgroups:
        if controllers and "memory" not in controllers.split(","):
            continue
        try:
            directory = cgroup_directory(controllers, path)
        except SevhopError:
            continue  # the destination cannot be put there either, which is said elsewhere
        for group in (directory, *directory.parents):
            room = _room(group, 1 if controllers else 2)
            if room is not None and room < need:
                return f"{group} has room for {room >> 20} MiB, and a second QEMU needs about {need >> 20}"
    return ""


def _room(group: Path, version: int) -> int | None:
    """Bytes that a cgroup has left; None if it has no limit, or is none."""
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
    What is to be told of the limits for a domain's memory; empty when it has none.

    :raises ProcessError: the process has ended.
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
                    f"the guest's memory stays charged to where the cgroup of its old QEMU was, so {', '.join(names)} "
                    "of the new one does not count it until the domain is started the next time"
                )
    return ""


def _limits_of(root: Path, path: str) -> list[str]:
    parts = [part for part in path.split("/") if part]
    own = next((number for number, part in enumerate(parts) if part.startswith(_OF_DOMAINS)), None)
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
