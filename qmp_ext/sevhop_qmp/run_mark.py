"""
The run mark: records whether the guest has run in the destination, for when that one has exited.

It is the first byte of a memfd. The library in the destination writes it right before the guest runs there for the
first time, and before it notifies the keeper. The memfd exists for as long as any process has it open. So a hop gives
it to the *source* as well: for as long as there is a source that could be resumed, there is the mark that records
whether it may be. It cannot grow, and nothing else is read from it: a QEMU is not trusted with more.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import os
from typing import Self

from . import selinux
from .errors import ProcessError
from .process import QemuProcess

_NAME = "sevhop-run-mark"
_LINK = f"/memfd:{_NAME} (deleted)"


class RunState(enum.IntEnum):
    """
    The value of the mark.

    ``NOT``
        the guest has not run there
    ``STARTING``
        the destination is about to notify the keeper, and the guest runs there if that succeeds. It stays so if the
        destination was killed just then: what became of the guest is unknown
    ``RAN``
        it runs there, or has
    """

    NOT = 0
    STARTING = 1
    RAN = 2


class RunMark:
    """
    One mark. :meth:`create` it, or :meth:`find` it where a command has left it; then :meth:`close`.

    :ivar inode: distinguishes it from the marks of other hops.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.inode = os.fstat(fd).st_ino

    @classmethod
    def create(cls) -> Self:
        """A new one: the guest has not run."""
        fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            selinux.share(fd)
        except BaseException:
            os.close(fd)
            raise
        os.ftruncate(fd, 1)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
        return cls(fd)

    @classmethod
    def find(cls, process: QemuProcess, inode: int) -> Self | None:
        """
        The mark of a hop in a process that was given it; None if it is not there.

        :raises ProcessError: the process has exited, or permission is denied.
        """
        result = None
        for found in cls.all_in(process):
            if found.inode == inode and result is None:
                result = found
            else:
                found.close()
        return result

    @classmethod
    def all_in(cls, process: QemuProcess) -> list[Self]:
        """
        Those that a process has; to be closed. A QEMU has that of the hop to it, too.

        :raises ProcessError: the process has exited, or permission is denied.
        """
        found = []
        for descriptor in process.descriptors():
            if descriptor.target == _LINK:
                with contextlib.suppress(ProcessError):  # closed meanwhile, or the process has exited
                    found.append(cls(process.duplicate(descriptor.number)))
        return found

    def fileno(self) -> int:
        """Its descriptor, which stays ours."""
        return self._fd

    def read(self) -> RunState:
        """Its value now; an invalid byte proves nothing, and is read as ``STARTING``."""
        byte = os.pread(self._fd, 1, 0)
        return RunState(byte[0]) if byte and byte[0] in (*RunState,) else RunState.STARTING

    def close(self) -> None:
        """Close our descriptor. Other processes keep theirs."""
        os.close(self._fd)
