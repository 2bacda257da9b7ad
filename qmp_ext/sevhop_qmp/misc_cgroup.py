"""
The misc cgroup controller, which counts SEV ASIDs.

A move charges the destination's cgroup for a new ASID before the source's is released. When the limit is
reached the kernel answers EBUSY, like for a migration in progress, although waiting will not help
(``sev_misc_cg_try_charge`` in arch/x86/kvm/svm/sev.c).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

CGROUP_ROOT = Path("/sys/fs/cgroup")
#: What the controller counts for SEV guests.
RESOURCES = ("sev", "sev_es")


class FullCgroup(NamedTuple):
    """A cgroup whose share of SEV ASIDs is used up. ``path`` is relative to the cgroup root."""

    path: str
    resource: str
    current: int
    limit: int

    def __str__(self) -> str:
        return f"cgroup {self.path}: {self.resource} {self.current} of {self.limit} in use"


def find_full(
    pid: int,
    root: Path = CGROUP_ROOT,
    proc: Path = Path("/proc"),
    *,
    resources: tuple[str, ...] = RESOURCES,
    above: re.Pattern[str] | None = None,
) -> FullCgroup | None:
    """
    The innermost cgroup of a process, or of its ancestors, that has no SEV (or SEV-ES) ASID left.

    :param resources: what is checked.
    :param above: skip a cgroup with such a name, and those below it; without such a cgroup nothing is checked.
    :return: None when none is full, or when the host has no misc controller.
    """
    for mount, path in _misc_paths(pid, root, proc):
        levels = [path, *path.parents]
        if above is not None:
            own = [number for number, level in enumerate(levels) if above.fullmatch(level.name)]
            levels = levels[own[-1] + 1 :] if own else []
        for level in levels:
            directory = mount / level.relative_to("/")
            current = _table(directory / "misc.current")
            # The root has no misc.max; what it cannot exceed is the capacity of the machine.
            limits = _table(directory / "misc.max") or _table(directory / "misc.capacity")
            for resource in resources:
                limit, used = limits.get(resource), current.get(resource)
                if limit is not None and used is not None and used >= limit:
                    return FullCgroup(str(level), resource, used, limit)
    return None


def _misc_paths(pid: int, root: Path, proc: Path) -> list[tuple[Path, Path]]:
    """(mount point, cgroup path) of each hierarchy that may have the misc controller."""
    try:
        lines = (proc / str(pid) / "cgroup").read_text().splitlines()
    except OSError:
        return []
    paths = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            unified = root / "unified"
            paths.append((unified if unified.is_dir() else root, Path(path)))
        elif "misc" in controllers.split(","):
            paths.append((root / "misc", Path(path)))
    return paths


def _table(file: Path) -> dict[str, int]:
    """``sev 5`` lines as a dictionary; ``max`` means no limit and is omitted."""
    try:
        rows = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}
