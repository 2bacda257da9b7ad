"""
The paths under which a guest is known: its sockets and its pid file. When a hop is over they lead to the destination.

The destination listens at the very sockets of the source, but the source, when it ends, removes their paths. So each
gets a second name before that, which is renamed afterwards. The destination writes its pid file under another name,
which takes the place of the source's.

We are root, and QEMU's user may write to these directories: exchange one for a link to another, or put something else
in the place of a file. So a directory is the one that it was when the hop began (device and inode), both names of a
file are in that one, and nothing is given a name but the socket or the pid file that was seen there before.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import stat
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import Address

#: Device and inode.
Identity = tuple[int, int]


@dataclass(frozen=True)
class NamePlates:
    """
    Paths, all absolute.

    :ivar sockets: (path, second name) of each socket.
    :ivar pidfile: (path that the destination writes, path it must have in the end), if there is one.
    :ivar directories: which ones these paths are in.
    :ivar files: what is at the paths of the sockets, and at the last one of the pid file, if anything is.
    """

    sockets: list[tuple[str, str]]
    pidfile: tuple[str, str] | None = None
    directories: dict[str, Identity] = field(default_factory=dict)
    files: dict[str, Identity] = field(default_factory=dict)

    @classmethod
    def of(cls, working_directory: str, listeners: Iterable[Address], pidfile: tuple[str, str] | None) -> Self:
        """
        The name plates of a guest.

        :param working_directory: of source and destination.
        :param listeners: where the source listens.
        """
        if pidfile is not None:
            pidfile = (os.path.join(working_directory, pidfile[0]), os.path.join(working_directory, pidfile[1]))
        self = cls([], pidfile)
        for address in listeners:
            name = address[1]
            if address[0] == socket.AF_UNIX and not name.startswith("\0"):
                path = Path(working_directory, name)
                if self._see(str(path), stat.S_ISSOCK):
                    self.sockets.append((str(path), str(path.with_name(f".{path.name[:16]}.{secrets.token_hex(8)}"))))
        if self.pidfile is not None:
            self._see(self.pidfile[1], stat.S_ISREG)
        return self

    def _see(self, path: str, kind: Any) -> bool:
        """Note what is at a path, and in which directory; whether it is of a kind."""
        directory, name = os.path.split(path)
        with contextlib.suppress(OSError):
            fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                self.directories[directory] = _identity(os.fstat(fd))
                found = os.stat(name, dir_fd=fd, follow_symlinks=False)
            finally:
                os.close(fd)
            if kind(found.st_mode):
                self.files[path] = _identity(found)
                return True
        return False

    def as_facts(self) -> dict[str, Any]:
        """For the journal."""
        return asdict(self)

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> Self:
        """
        Back again.

        :raises ValueError, TypeError, KeyError: these are none.
        """
        sockets = [(str(path), str(spare)) for path, spare in facts["sockets"]]
        pidfile = facts["pidfile"]
        directories, files = _identities(facts["directories"]), _identities(facts["files"])
        return cls(sockets, pidfile and (str(pidfile[0]), str(pidfile[1])), directories, files)

    def keep(self) -> None:
        """Before the source ends: second names for its sockets."""
        for path, spare in self.sockets:
            with contextlib.suppress(OSError, SevhopError), self._directory(path) as fd:
                name, second = os.path.basename(path), os.path.basename(spare)
                os.link(name, second, src_dir_fd=fd, dst_dir_fd=fd, follow_symlinks=False)
                if _at(second, fd) != self.files.get(path):
                    os.unlink(second, dir_fd=fd)

    def hand_over(self) -> list[str]:
        """
        When it has ended: its names are the destination's.

        :return: what was not done since somebody has meddled.
        """
        notes = []
        for path, spare in self.sockets:
            with contextlib.suppress(OSError):
                try:
                    self._hand_over_socket(path, spare)
                except SevhopError as err:
                    notes.append(err.message)
        if self.pidfile is not None:
            with contextlib.suppress(OSError):
                try:
                    self._hand_over_pidfile(*self.pidfile)
                except SevhopError as err:
                    notes.append(err.message)
        return notes

    def _hand_over_socket(self, path: str, spare: str) -> None:
        with self._directory(path) as fd:
            name, second = os.path.basename(path), os.path.basename(spare)
            there = _at(second, fd)
            if there is None:
                return  # this was done before
            if there != self.files.get(path):
                raise SevhopError(f"{spare} is not what it was: {path} may not lead to the new QEMU")
            if _at(name, fd) is not None:
                os.unlink(second, dir_fd=fd)
            else:
                os.rename(second, name, src_dir_fd=fd, dst_dir_fd=fd)

    def _hand_over_pidfile(self, temporary: str, final: str) -> None:
        with self._directory(final) as fd:
            name, first = os.path.basename(final), os.path.basename(temporary)
            if not stat.S_ISREG(os.stat(first, dir_fd=fd, follow_symlinks=False).st_mode):
                raise SevhopError(f"{temporary} is not a file any more: there is no pid file")
            if (there := _at(name, fd)) is not None and there != self.files.get(final):
                raise SevhopError(f"{final} is not the source's pid file any more: that of the new QEMU is {temporary}")
            os.replace(first, name, src_dir_fd=fd, dst_dir_fd=fd)

    def take_back(self) -> None:
        """The source stays: what was made for the destination goes away."""
        made = [spare for _, spare in self.sockets] + ([self.pidfile[0]] if self.pidfile else [])
        for path in made:
            with contextlib.suppress(OSError, SevhopError), self._directory(path) as fd:
                os.unlink(os.path.basename(path), dir_fd=fd)

    @contextlib.contextmanager
    def _directory(self, path: str) -> Iterator[int]:
        """
        The directory of a path.

        :raises SevhopError: it is another one than it was.
        :raises OSError: there is none.
        """
        directory = os.path.dirname(path)
        fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if _identity(os.fstat(fd)) != self.directories.get(directory):
                raise SevhopError(f"{directory} is not the directory that it was: {path} is left as it is")
            yield fd
        finally:
            os.close(fd)


def _identity(file: os.stat_result) -> Identity:
    return file.st_dev, file.st_ino


def _at(name: str, directory: int) -> Identity | None:
    """What is there; None if nothing is."""
    try:
        return _identity(os.stat(name, dir_fd=directory, follow_symlinks=False))
    except FileNotFoundError:
        return None


def _identities(facts: object) -> dict[str, Identity]:
    found = {}
    for path, (device, inode) in dict(facts).items():  # type: ignore[call-overload]
        if not isinstance(device, int) or not isinstance(inode, int):
            raise ValueError(f"{device!r}, {inode!r} is no file")
        found[str(path)] = (device, inode)
    return found
