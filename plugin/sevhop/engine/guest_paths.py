"""
The paths under which a guest is known: its sockets and its pid file. After a hop they lead to the destination.

The destination listens on the source's own sockets, but the source, when it exits, removes their paths. So each
gets a second link before that, which is renamed afterwards. The destination writes its pid file under another name,
which takes the place of the source's.

We are root, and QEMU's user may write to these directories: replace one by a link to another, or a file by something
else. So a directory must be the one that it was when the hop began (device and inode), both names of a file are in that
one, and nothing is linked or renamed but the socket or the pid file that was found there before.
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
from sevhop_qmp.invalid_data import InvalidData
from sevhop_qmp.stream_sockets import Address

#: Device and inode.
Identity = tuple[int, int]


@dataclass(frozen=True)
class GuestPaths:
    """
    Paths, all absolute.

    :ivar sockets: (path, second name) of each socket.
    :ivar pidfile: (path that the destination writes, path it must have in the end), if there is one.
    :ivar directories: identity of each directory that these paths are in.
    :ivar files: identity of what is at the paths of the sockets, and at the final one of the pid file, if anything is.
    """

    sockets: list[tuple[str, str]]
    pidfile: tuple[str, str] | None = None
    directories: dict[str, Identity] = field(default_factory=dict)
    files: dict[str, Identity] = field(default_factory=dict)

    @classmethod
    def of(cls, working_directory: str, listeners: Iterable[Address], pidfile: tuple[str, str] | None) -> Self:
        """
        The paths of a guest.

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
                if self._identify(str(path), stat.S_ISSOCK):
                    self.sockets.append((str(path), str(path.with_name(f".{path.name[:16]}.{secrets.token_hex(8)}"))))
        if self.pidfile is not None:
            self._identify(self.pidfile[1], stat.S_ISREG)
        return self

    def _identify(self, path: str, kind: Any) -> bool:
        """Record the identity of a file and its directory. :return: whether the file is of that kind."""
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

    def as_fields(self) -> dict[str, Any]:
        """For the journal."""
        return asdict(self)

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        """
        From the journal.

        :raises ValueError, TypeError, KeyError: the fields are invalid.
        """
        sockets = [(str(path), str(spare)) for path, spare in fields["sockets"]]
        pidfile = fields["pidfile"]
        directories, files = _identities(fields["directories"]), _identities(fields["files"])
        return cls(sockets, pidfile and (str(pidfile[0]), str(pidfile[1])), directories, files)

    def link(self) -> None:
        """Before the source exits: second links for its sockets."""
        for path, spare in self.sockets:
            with contextlib.suppress(OSError, SevhopError), self._directory(path) as fd:
                name, second = os.path.basename(path), os.path.basename(spare)
                os.link(name, second, src_dir_fd=fd, dst_dir_fd=fd, follow_symlinks=False)
                if _at(second, fd) != self.files.get(path):
                    os.unlink(second, dir_fd=fd)

    def publish(self) -> list[str]:
        """
        When the source has exited: give its names to the destination's sockets and pid file.

        :return: what was not done, because another client has changed it.
        """
        notes = []
        for path, spare in self.sockets:
            with contextlib.suppress(OSError):
                try:
                    self._publish_socket(path, spare)
                except SevhopError as err:
                    notes.append(err.message)
        if self.pidfile is not None:
            with contextlib.suppress(OSError):
                try:
                    self._publish_pidfile(*self.pidfile)
                except SevhopError as err:
                    notes.append(err.message)
        return notes

    def _publish_socket(self, path: str, spare: str) -> None:
        with self._directory(path) as fd:
            name, second = os.path.basename(path), os.path.basename(spare)
            there = _at(second, fd)
            if there is None:
                return  # this was done before
            if there != self.files.get(path):
                raise SevhopError(
                    f"another process has replaced {spare}, and {path} may not lead to the new QEMU: "
                    "see who can write there"
                )
            if _at(name, fd) is not None:
                os.unlink(second, dir_fd=fd)
            else:
                os.rename(second, name, src_dir_fd=fd, dst_dir_fd=fd)

    def _publish_pidfile(self, temporary: str, final: str) -> None:
        with self._directory(final) as fd:
            name, first = os.path.basename(final), os.path.basename(temporary)
            if not stat.S_ISREG(os.stat(first, dir_fd=fd, follow_symlinks=False).st_mode):
                raise SevhopError(
                    f"{temporary} is not a regular file any more: write the pid of the new QEMU to {final}"
                )
            if (there := _at(name, fd)) is not None and there != self.files.get(final):
                raise SevhopError(
                    f"another process has replaced {final}: rename {temporary}, the pid file of the new QEMU"
                )
            os.replace(first, name, src_dir_fd=fd, dst_dir_fd=fd)

    def discard(self) -> None:
        """The hop is rolled back: remove what was made for the destination."""
        made = [spare for _, spare in self.sockets] + ([self.pidfile[0]] if self.pidfile else [])
        for path in made:
            with contextlib.suppress(OSError, SevhopError), self._directory(path) as fd:
                os.unlink(os.path.basename(path), dir_fd=fd)

    @contextlib.contextmanager
    def _directory(self, path: str) -> Iterator[int]:
        """
        The directory of a path.

        :raises SevhopError: it was replaced.
        :raises OSError: there is none.
        """
        directory = os.path.dirname(path)
        fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if _identity(os.fstat(fd)) != self.directories.get(directory):
                raise SevhopError(
                    f"another process has replaced the directory {directory}, so {path} is unchanged: "
                    "see who can write there"
                )
            yield fd
        finally:
            os.close(fd)


def _identity(file: os.stat_result) -> Identity:
    return file.st_dev, file.st_ino


def _at(name: str, directory: int) -> Identity | None:
    """The identity of a file in a directory; None if there is none."""
    try:
        return _identity(os.stat(name, dir_fd=directory, follow_symlinks=False))
    except FileNotFoundError:
        return None


def _identities(fields: object) -> dict[str, Identity]:
    found = {}
    for path, (device, inode) in dict(fields).items():  # type: ignore[call-overload]
        if not isinstance(device, int) or not isinstance(inode, int):
            raise InvalidData(f"device and inode of {path} are no numbers")
        found[str(path)] = (device, inode)
    return found
