"""
Where programs are kept (:mod:`.kept_emulator`). The path has two things in it: the domain, and the original path, which
the persistent definition keeps.
"""

from __future__ import annotations

import re
import secrets

#: One directory for each program; others may search it, but not list it.
DIRECTORY = "/var/lib/sevhop/emulators"
_KEPT = re.compile(rf"({DIRECTORY}/[0-9a-f-]{{36}}\.[0-9a-f]{{16}})/emulator(/.+)")


def place(uuid: str, emulator: str) -> str:
    """
    Where a program can be kept; nothing is made yet.

    :param uuid: of the domain.
    :param emulator: in its XML.
    :return: another path each time.
    """
    return f"{DIRECTORY}/{uuid.lower()}.{secrets.token_hex(8)}/emulator{original(emulator)}"


def original(path: str) -> str:
    """The emulator whose program is kept at a path; the path itself if it is not one of :func:`place`."""
    found = _KEPT.fullmatch(path)
    return found[2] if found else path


def directory(path: str) -> str:
    """The directory of a kept program; empty if the path is not one of :func:`place`."""
    found = _KEPT.fullmatch(path)
    return found[1] if found else ""


def domain(directory: str) -> str:
    """The UUID of the domain whose program is in a directory."""
    return directory.rpartition("/")[2].partition(".")[0]
