"""
The run mark: whether the guest has run in the destination, for whoever must know it although that one has ended.

It is the first byte of a memfd. The library in the destination writes it right before the guest runs there for the
first time, and before it tells the keeper. The memfd lives for as long as any process has it open. So a hop gives it to
the *source* as well: for as long as there is a source that could be continued, there is the mark that tells whether it
may be. It cannot grow, and nothing else is read from it: a QEMU is not trusted with more.
"""

from __future__ import annotations

import enum
import fcntl
import os
from typing import Self

from .errors import ProcessError
from .process import QemuProcess

_NAME = "sevhop-run-mark"
_LINK = f"/memfd:{_NAME} (deleted)"


class RunState(enum.IntEnum):
    """
    What the mark tells.

    ``NOT``
        the guest has not run there
    ``STARTING``
        it runs there if the keeper has been told; the next moment decides. So it was when the destination was killed
        just then, and what became of the guest cannot be told
    ``RAN``
        it runs there, or has
    """

    NOT = 0
    STARTING = 1
    RAN = 2


class RunMark:
    """
    One mark. :meth:`create` it, or :meth:`find` it where a command has left it; then :meth:`close`.

    :ivar inode: what tells it from the marks of other hops.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.inode = os.fstat(fd).st_ino

    @classmethod
    def create(cls) -> Self:
        """A new one: the guest has not run."""
        fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, 1)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
        return cls(fd)

    @classmethod
    def find(cls, process: QemuProcess, inode: int) -> Self | None:
        """
        The mark of a hop in a process that was given it; None if it is not there.

        :raises ProcessError: the process has ended, or we may not look.
        """
        for descriptor in process.descriptors():
            if descriptor.target != _LINK:
                continue
            try:
                found = cls(process.duplicate(descriptor.number))
            except ProcessError:
                continue  # closed meanwhile, or the process has ended, which the next look tells
            if found.inode == inode:
                return found
            found.close()
        return None

    def fileno(self) -> int:
        """Its descriptor, which stays ours."""
        return self._fd

    def read(self) -> RunState:
        """What it tells now. A byte that means nothing is no proof of anything."""
        byte = os.pread(self._fd, 1, 0)
        return RunState(byte[0]) if byte and byte[0] in (*RunState,) else RunState.STARTING

    def close(self) -> None:
        """Let go of it. It stays with whoever else has it."""
        os.close(self._fd)
