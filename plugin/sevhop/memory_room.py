"""
Whether the source's cgroup has memory for a second QEMU.

The destination is in the source's cgroup while both are there. If memory is out, the kernel should end the destination,
and the guest does not notice. But its ``oom_score_adj`` counts in parts of the cgroup's limit, and a source may have
more memory mapped than that; a cgroup may ask for all of its processes to be ended together (``memory.oom.group``); and
systemd may stop a scope in which one was ended (``OOMPolicy=`` of systemd.scope(5)). So a cgroup that has no room is
found before.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sevhop_qmp.errors import SevhopError

from .scheduling import cgroup_directory

#: Bytes of its own that a QEMU takes with many devices, and then some; one that has more has lived for long.
MOST = 48 << 20
#: By version of cgroup: the limit, what is used, and what of it can be had back without anybody's memory being taken.
_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
    2: ("memory.max", "memory.current", ("inactive_file", "active_file")),
}


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
