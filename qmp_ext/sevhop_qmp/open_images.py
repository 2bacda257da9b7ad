"""
The files that a QEMU has open, read from outside: which ones they really are, whatever their paths lead to now.

A disk image is identified by device and inode, a disk of the host by its device number. QEMU does not report which
descriptor belongs to which block node, so a node's image is looked up by its path, and then among the descriptors: a
path that leads to a file which QEMU does not have open leads to another one than when QEMU opened it.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable

from .errors import ProcessError
from .proc_directory import ProcDirectory
from .process import QemuProcess

#: Bytes of a block in ``st_blocks``, whatever the file system has (stat(2)).
_SECTOR = 512

#: Device and inode of a file; for a device of the host also its number.
Identity = tuple[int, int, int]


class OpenFiles(ProcDirectory):
    """
    The regular files and block devices that a process has open, without its memory (memfds).

    :meth:`changed` is called while the guest is stopped, so it reads as little as possible.
    """

    def __init__(self, process: QemuProcess) -> None:
        """
        :raises ProcessError: it has exited, or permission is denied.
        """
        self._process = process
        try:
            super().__init__(process.pid, "fd")
        except OSError as err:
            raise ProcessError(f"cannot read /proc/{process.pid}/fd: {err.strerror}") from err
        self._names: frozenset[str] = frozenset()
        self._files: dict[str, Identity] = {}
        try:
            self.refresh()
        except BaseException:
            self.close()
            raise

    def refresh(self) -> None:
        """
        Read all descriptors again.

        :raises ProcessError: the process has exited.
        """
        names = self._list()
        self._files = {name: found for name in names if (found := self._identity(name)) is not None}
        self._names = names

    @property
    def identities(self) -> frozenset[Identity]:
        """Of all files, at the last :meth:`refresh`."""
        return frozenset(self._files.values())

    def changed(self, *, quick: bool = False) -> set[Identity]:
        """
        The files that have been opened, or closed for good, since :meth:`refresh`.

        :param quick: do not read numbers again that were no file then, unless something seems to have changed: an image
            that was opened again may have got one of them.
        :raises ProcessError: the process has exited.
        """
        names = self._list()
        if quick and not self._among((names - self._names) | (self._files.keys() & names)) ^ self.identities:
            return set()
        return self._among(names) ^ self.identities

    def _among(self, names: Iterable[str]) -> set[Identity]:
        return {found for name in names if (found := self._identity(name)) is not None}

    def writable(self, identity: Identity) -> bool:
        """Whether the process has a descriptor now with which it can write to a file; also if it has exited."""
        try:
            names = self._list()
        except ProcessError:
            return True
        return any(self._identity(name) == identity and self._writes(name) for name in names)

    def _writes(self, name: str) -> bool:
        try:
            # The permissions of the link are those of the descriptor (proc(5)).
            return bool(os.stat(name, dir_fd=self._directory, follow_symlinks=False).st_mode & stat.S_IWUSR)
        except OSError:
            return False  # closed meanwhile

    def path(self, identity: Identity) -> str:
        """The kernel's current path of a file; empty when it is not open any more."""
        for name in self._list():
            if self._identity(name) == identity:
                with contextlib.suppress(OSError):
                    return os.readlink(name, dir_fd=self._directory)
        return ""

    def allocated(self) -> dict[Identity, int]:
        """Bytes that each regular file takes on its disk, now."""
        found = {}
        for name, identity in self._files.items():
            with contextlib.suppress(OSError):
                status = os.stat(name, dir_fd=self._directory)
                if stat.S_ISREG(status.st_mode):
                    found[identity] = status.st_blocks * _SECTOR
        return found

    def _list(self) -> frozenset[str]:
        try:
            return frozenset(os.listdir(self._directory))
        except OSError as err:
            raise ProcessError(f"process {self._process.pid} has exited") from err

    def _identity(self, name: str) -> Identity | None:
        try:
            status = os.stat(name, dir_fd=self._directory)
        except OSError:
            return None  # closed meanwhile
        return file_identity(status) if status.st_dev != _MEMORY else None


def file_identity(status: os.stat_result) -> Identity | None:
    """Which file or block device it is; None for everything else."""
    if stat.S_ISREG(status.st_mode):
        return (status.st_dev, status.st_ino, 0)
    if stat.S_ISBLK(status.st_mode):
        return (0, 0, status.st_rdev)
    return None


def identity_at(process: QemuProcess, path: str) -> Identity | None:
    """
    Which file a path leads to now, for a process: from its root or working directory.

    :return: None when it leads to no file or block device.
    """
    proc = f"/proc/{process.pid}"
    try:
        status = os.stat(f"{proc}/root{path}" if path.startswith("/") else f"{proc}/cwd/{path}")
    except (OSError, ValueError):
        return None
    return file_identity(status)


def _memory_device() -> int:
    """The device number of the kernel's own tmpfs, on which memfds are."""
    fd = os.memfd_create("sevhop", os.MFD_CLOEXEC)
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)


_MEMORY = _memory_device()
