"""
The address space of a process, kept alive after its exit.

When a process exits, the kernel unmaps its memory page by page, 0.1 s for 4 GB, before it closes its descriptors and
notifies its parent. Whoever waits for the exit waits for that. Unless something else has a reference to the address
space: then the process exits at once, and the memory is unmapped when that reference is dropped.

The only such reference without code in the process is a read of one of its files in ``/proc`` (``pagemap``, proc(5)),
for as long as the read is in progress. This one is blocked by userfaultfd(2): it reads into a page that nobody
provides.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import mmap
import os
import select
import struct
import threading
from types import TracebackType
from typing import Self

from .errors import ProcessError

log = logging.getLogger(__name__)

_SYS_USERFAULTFD = 323
# include/uapi/linux/userfaultfd.h
_UFFD_API = 0xAA
_UFFDIO_API = 0xC018AA3F
_UFFDIO_REGISTER = 0xC020AA00
_UFFDIO_REGISTER_MODE_MISSING = 1
#: Bytes of the entry of one page.
_ENTRY_SIZE = 8
#: Seconds in which the read must begin. It waits while the process changes its mappings.
_PATIENCE = 0.2

_libc = ctypes.CDLL(None, use_errno=True)


class AddressSpace:
    """
    The address space of a process, which is not destroyed until this is closed.

    Closing costs no time either: the memory is unmapped in a thread that the exit of our process does not wait for.
    """

    def __init__(self, pid: int) -> None:
        """:raises ProcessError: there is no such process, or the kernel does not permit it."""
        try:
            self._faults = _userfaultfd()
            try:
                _begin_to_read(f"/proc/{pid}/pagemap", self._faults)
            except OSError:
                self.close()
                raise
        except OSError as err:
            raise ProcessError(f"cannot keep the address space of process {pid}: {err.strerror}") from err

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop the reference."""
        # The page becomes an ordinary one, and the read completes.
        os.close(self._faults)


def _userfaultfd() -> int:
    fd = int(_libc.syscall(_SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK))
    if fd < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    fcntl.ioctl(fd, _UFFDIO_API, struct.pack("=QQQ", _UFFD_API, 0, 0))
    return fd


def _begin_to_read(path: str, faults: int) -> None:
    """Start a thread that reads a file into a page that is missing until ``faults`` is closed."""
    page = mmap.mmap(-1, mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    register = struct.pack("=QQQQ", address, mmap.PAGESIZE, _UFFDIO_REGISTER_MODE_MISSING, 0)
    fcntl.ioctl(faults, _UFFDIO_REGISTER, register)
    pagemap = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    over, at_its_end = os.pipe()

    def read() -> None:
        try:
            os.preadv(pagemap, [memoryview(page)[:_ENTRY_SIZE]], 0)
        except OSError as err:
            log.debug("%s: %s", path, err)
        finally:
            os.close(pagemap)
            os.close(at_its_end)

    threading.Thread(target=read, daemon=True).start()
    try:
        poll = select.poll()
        for descriptor in (faults, over):
            poll.register(descriptor, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll(_PATIENCE * 1e3)}
        if faults not in ready:
            error = errno.ESRCH if over in ready else errno.ETIMEDOUT
            raise OSError(error, os.strerror(error))
    finally:
        os.close(over)
