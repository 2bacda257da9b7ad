"""How much memory the host has left for further QEMUs."""

from __future__ import annotations

from pathlib import Path

from .cgroup_memory import MOST

#: Bytes that an upgrade needs at most, besides the guest's memory: a transit and a destination, each with all devices.
OF_AN_UPGRADE = 2 * MOST
_FILE = Path("/proc/meminfo")


def has_room(upgrades: int, file: Path = _FILE) -> bool:
    """
    Whether that many upgrades can be in progress at a time, by ``MemAvailable`` (proc(5)).

    :return: True as well if the kernel does not say.
    """
    try:
        for line in file.read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) << 10 >= upgrades * OF_AN_UPGRADE
    except (OSError, ValueError, IndexError):
        pass
    return True
