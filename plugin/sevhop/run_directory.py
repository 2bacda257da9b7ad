"""
Where hops under way are found: ``/run/sevhop``.

Each hop of a domain has a directory there, with a name that cannot be guessed, and a link in ``domains`` that is named
like the domain. It is claimed by the keeper (:mod:`sevhop.custody`) and removed with it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
from pathlib import Path

from sevhop_qmp.errors import SevhopError

#: What every hop under way has a directory in; root's, others may only pass through.
RUN = Path("/run/sevhop")
#: One link for each hop under way, named like the domain; the hook looks here.
DOMAINS = RUN / "domains"


class HopUnderWay(SevhopError):
    """The domain is in a hop already."""


def make_run_directories() -> None:
    """Make those directories that all hops share. QEMU's user may pass through the outer one, but not list it."""
    RUN.mkdir(mode=0o711, exist_ok=True)
    RUN.chmod(0o711)
    DOMAINS.mkdir(mode=0o700, exist_ok=True)


def claim(name: str) -> Path:
    """
    Make the directory of a keeper, and the link by which the hook finds it. What a dead keeper has left is removed.

    :raises HopUnderWay: a hop of this domain is under way.
    """
    make_run_directories()
    left = hop_of(name)
    if left is not None:
        if alive(left):
            raise HopUnderWay(f"a hop of domain {name} is under way", "see sevhop status")
        remove(name, left)
    # The name cannot be guessed, and the directory above cannot be listed by others.
    directory = RUN / secrets.token_hex(16)
    directory.mkdir(mode=0o711)
    try:
        os.symlink(f"../{directory.name}", DOMAINS / name)
    except OSError as err:
        directory.rmdir()
        raise HopUnderWay(f"a hop of domain {name} is under way", "see sevhop status") from err
    return directory


def alive(directory: Path) -> bool:
    """Whether a keeper serves this directory."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        try:
            sock.connect(str(directory / "control"))
        except OSError:
            return False
    return True


def remove(name: str, directory: Path) -> None:
    """Remove what :func:`claim` made."""
    with contextlib.suppress(OSError):
        if (DOMAINS / name).resolve() == directory.resolve():
            (DOMAINS / name).unlink()
    shutil.rmtree(directory, ignore_errors=True)


def hop_of(name: str) -> Path | None:
    """The directory of the keeper of a domain, None when it is in no hop. The keeper may be dead."""
    try:
        return DOMAINS / os.readlink(DOMAINS / name)
    except OSError:
        return None


def hops_under_way() -> list[str]:
    """Names of the domains that are in a hop, or whose keeper has died."""
    try:
        return sorted(name for name in os.listdir(DOMAINS) if hop_of(name))
    except FileNotFoundError:
        return []
