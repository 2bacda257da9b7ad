"""
Where the hops in progress are: ``/run/sevhop``.

Each hop has a directory there, with a name that cannot be guessed. That of a domain also has a link in ``domains``,
named like the domain, and one beside it that has the domain's UUID in its name, since a domain that is shut off can be
renamed; both are claimed by the keeper (:mod:`sevhop.keeper.main`) and removed with it. That of a guest outside
libvirt has the destination's monitor in it (:mod:`sevhop.engine.destination`).
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import stat
from pathlib import Path

from sevhop_qmp import selinux
from sevhop_qmp.errors import SevhopError

from ..libvirt.hook import TRANSIT, transit_of

#: The parent of the directories of all hops; root's, others may only search it.
RUN = Path("/run/sevhop")
#: One link for each hop in progress, named like the domain; the hook looks here.
DOMAINS = RUN / "domains"
#: One directory for each domain whose reboots are recorded, see :mod:`.reboot_mark`.
REBOOTS = RUN / "reboot"
#: The target of such a link: a directory beside it. Any other was not made by sevhop.
_TARGET = re.compile(r"\.\./[0-9a-f]{32}")
#: Prefix of a domain's UUID in the name of its link; the hook has it as well.
UUID_LINK = "uuid-"
#: Seconds after which a socket whose connections nobody accepts is in use all the same.
_CONNECT_TIMEOUT = 1.0
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


class RunDirectoryError(SevhopError):
    """A run directory cannot be made, or was not made by sevhop; its owner could redirect a hop."""


class HopInProgress(SevhopError):
    """The guest is in a hop already."""


def make_run_directories() -> None:
    """
    Make the directories that the hops of all domains share.

    :raises RunDirectoryError: they cannot be made, or something else is in their place.
    """
    _make_outer()
    make_or_check(DOMAINS, 0o700)


def _make_outer() -> None:
    """QEMU's user may search it, but not list it. What is made in there has its label."""
    make_or_check(RUN, 0o711)
    selinux.share(RUN)


def make_or_check(path: Path, mode: int) -> None:
    """
    Make a directory, unless it is there and nobody else can write to it.

    :raises RunDirectoryError: it cannot be made, or something else is in its place.
    """
    try:
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=mode)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as err:
        hint = "run sevhop as root" if isinstance(err, PermissionError) else f"see what {path} is, and remove it"
        raise RunDirectoryError(f"{path} cannot be made or is no directory: {err.strerror}", hint) from err
    try:
        found = os.fstat(fd)
        if found.st_uid != os.geteuid():
            hint = "see who made it, and remove it" if found.st_uid else "run sevhop as root"
            raise RunDirectoryError(f"{path} belongs to user {found.st_uid}", hint)
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise RunDirectoryError(f"{path} can be written by others", "see what is in it, and remove it")
        os.fchmod(fd, mode)
    finally:
        os.close(fd)


def make(mode: int = 0o700) -> Path:
    """Make a directory for a hop. Its name cannot be guessed, and its parent cannot be listed by others."""
    _make_outer()
    directory = RUN / secrets.token_hex(16)
    directory.mkdir(mode=0o700)
    directory.chmod(mode)  # a umask does not count: QEMU's user must reach what is in the directory of a keeper
    return directory


def claim(name: str, uuid: str, *, transit: str = "") -> Path:
    """
    Make the directory of a keeper, and the links by which the hook finds it. What a dead keeper has left is removed.

    :param transit: pid and start time of the QEMU beside libvirt that the guest runs in, if it does. It is in the
        directory before the hook finds that, so that nobody can start the domain before the keeper serves it.
    :raises HopInProgress: a hop of this domain is in progress, or its guest runs in another transit.
    :raises RunDirectoryError: something else is in the place of what is made here.
    """
    if not _can_be_a_name(name):
        raise RunDirectoryError(f"{name!a} is not the name of a domain")
    if not _UUID.fullmatch(uuid):
        raise RunDirectoryError(f"{uuid!a} is not the UUID of a domain")
    make_run_directories()
    left = hop_of(name)
    if left is not None and (alive(left) or _has_another_transit(left, transit)):
        raise HopInProgress(f"a hop of domain {name} is in progress", "see sevhop status")
    directory = _with_transit(make(mode=0o711), transit)
    try:
        if left is not None:
            _unlink(name, left)
        os.symlink(f"../{directory.name}", DOMAINS / name)
    except OSError as err:
        shutil.rmtree(directory, ignore_errors=True)
        if isinstance(err, FileExistsError) and hop_of(name) is not None:
            raise HopInProgress(f"a hop of domain {name} is in progress", "see sevhop status") from err
        raise RunDirectoryError(f"{DOMAINS / name}: {err.strerror}", "if it is there, remove it") from err
    by_uuid = RUN / f"{UUID_LINK}{uuid.lower()}"
    try:
        if by_uuid.is_symlink() and not alive(by_uuid) and not _has_another_transit(by_uuid, transit):
            by_uuid.unlink()
        os.symlink(directory.name, by_uuid)
    except OSError as err:
        remove(name, directory)
        if isinstance(err, FileExistsError) and (alive(by_uuid) or transit_of(str(by_uuid))):
            raise HopInProgress(f"a hop of the domain with UUID {uuid} is in progress", "see sevhop status") from err
        raise RunDirectoryError(f"{by_uuid}: {err.strerror}", "if it is there, remove it") from err
    if left is not None:
        shutil.rmtree(left, ignore_errors=True)
    return directory


def _with_transit(directory: Path, transit: str) -> Path:
    """:raises RunDirectoryError: the disk is full."""
    try:
        if transit:
            note_transit(directory, transit)
    except RunDirectoryError:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    return directory


def note_transit(directory: Path, transit: str) -> None:
    """
    Leave there which process is the transit.

    :param transit: its number, and when it was started.
    :raises RunDirectoryError: the disk is full.
    """
    try:
        (directory / TRANSIT).write_text(transit)
    except OSError as err:
        raise RunDirectoryError(f"{directory}: {err.strerror}", "free space in /run, then try again") from err


def _has_another_transit(directory: Path, transit: str) -> bool:
    pid = transit_of(str(directory))
    return bool(pid) and pid != transit.partition(" ")[0]


def _can_be_a_name(name: str) -> bool:
    """Of a domain, and of a file: libvirt allows no other names."""
    try:
        return os.fsencode(name) not in (b"", b".", b"..") and not {"/", "\0"} & set(name)
    except UnicodeEncodeError:
        return False


def listening(path: Path, uid: int) -> socket.socket:
    """A listening socket to which one user can connect, and root."""
    with selinux.sharing_sockets():
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    listener.bind(str(path))
    os.chmod(path, 0o600)
    os.chown(path, uid, -1)
    listener.listen(8)
    return listener


def alive(directory: Path) -> bool:
    """Whether a keeper serves this directory."""
    return _listens(directory / "control", socket.SOCK_SEQPACKET)


def in_hop(uuid: str) -> bool:
    """Whether a keeper serves the domain with this UUID."""
    return alive(RUN / f"{UUID_LINK}{uuid.lower()}")


def _listens(path: Path, kind: int) -> bool:
    with socket.socket(socket.AF_UNIX, kind) as sock:
        sock.settimeout(_CONNECT_TIMEOUT)
        try:
            sock.connect(str(path))
        except (BlockingIOError, TimeoutError):
            return True  # it does, and others wait already
        except OSError:
            return False
    return True


def remove(name: str, directory: Path) -> None:
    """Remove what :func:`claim` made."""
    _unlink(name, directory)
    shutil.rmtree(directory, ignore_errors=True)


def _unlink(name: str, directory: Path) -> None:
    with contextlib.suppress(OSError):
        if (DOMAINS / name).resolve() == directory.resolve():
            (DOMAINS / name).unlink()
    for link in _uuid_links():
        with contextlib.suppress(OSError):
            if link.resolve() == directory.resolve():
                link.unlink()


def _uuid_links() -> list[Path]:
    with contextlib.suppress(OSError):
        return [path for path in RUN.iterdir() if path.name.startswith(UUID_LINK) and path.is_symlink()]
    return []


def hop_of(name: str) -> Path | None:
    """
    The directory of the keeper of a domain, None when it is in no hop. The keeper may be dead.

    :raises RunDirectoryError: only root can know that.
    """
    try:
        target = os.readlink(DOMAINS / name) if _can_be_a_name(name) else ""
    except PermissionError as err:
        raise RunDirectoryError(f"cannot read {DOMAINS}: {err.strerror}", "run sevhop as root") from err
    except OSError:
        return None
    return DOMAINS / target if _TARGET.fullmatch(target) else None


def hop_with(uuid: str) -> Path:
    """Where the directory of the keeper of the domain with this UUID is, if it is in a hop."""
    return (RUN / f"{UUID_LINK}{uuid.lower()}").resolve()


def hops_in_progress() -> list[str]:
    """Names of the domains that are in a hop, or whose keeper has died."""
    return [name for name in entries(DOMAINS) if hop_of(name)]


def entries(directory: Path) -> list[str]:
    """
    The names in a directory; none if it does not exist.

    :raises RunDirectoryError: it cannot be read.
    """
    try:
        return sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
    except OSError as err:
        hint = "run sevhop as root" if isinstance(err, PermissionError) else f"see what {directory} is"
        raise RunDirectoryError(f"cannot read {directory}: {err.strerror}", hint) from err


def sweep(used: set[str]) -> None:
    """
    Remove what killed hops have left, but not that of a guest that runs in a transit: the hook finds it by that.

    :param used: directories that a journal mentions.
    :raises RunDirectoryError: what is there was not made by sevhop.
    """
    if not RUN.is_symlink() and not RUN.is_dir():
        return
    _make_outer()
    for name in hops_in_progress():
        directory = hop_of(name)
        if directory is not None and not _needed(directory) and str(RUN / directory.name) not in used:
            remove(name, directory)
    for link in _uuid_links():
        if not link.exists():
            link.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        for path in RUN.iterdir():
            if path not in (DOMAINS, REBOOTS) and not path.is_symlink() and str(path) not in used and not _served(path):
                shutil.rmtree(path, ignore_errors=True)


def _needed(directory: Path) -> bool:
    """Whether a keeper listens there, or the hook needs it."""
    return alive(directory) or bool(transit_of(str(directory)))


def _served(directory: Path) -> bool:
    """The same, or whether a destination listens there."""
    return _needed(directory) or _listens(directory / "monitor", socket.SOCK_STREAM)
