"""What a guest's memory can have from the host only if the host is asked first: huge pages. All is restored."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path

from .build import Unavailable

_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
_TRANSPARENT = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
#: Of an entry in pagemap.
_FRAME = (1 << 55) - 1
#: KPF_THP (include/uapi/linux/kernel-page-flags.h).
_TRANSPARENT_HUGE = 1 << 22


@contextlib.contextmanager
def huge_pages(count: int) -> Iterator[None]:
    """
    Have this many more huge pages of 2 MiB (Documentation/admin-guide/mm/hugetlbpage.rst).

    :raises Unavailable: the kernel has none to give.
    """
    with _setting(_POOL) as before:
        _POOL.write_text(str(int(before) + count))
        if int(_POOL.read_text()) < int(before) + count:
            raise Unavailable(f"the kernel does not find {count} huge pages of 2 MiB")
        yield


@contextlib.contextmanager
def transparent_huge_pages() -> Iterator[None]:
    """
    Have memfds made of huge pages where possible (Documentation/admin-guide/mm/transhuge.rst).

    :raises Unavailable: the kernel does not do that.
    """
    with _setting(_TRANSPARENT):
        _TRANSPARENT.write_text("always")
        yield


def huge_pages_of(memfd: Path) -> int:
    """
    Bytes of a memfd that are in transparent huge pages (Documentation/admin-guide/mm/pagemap.rst).

    :raises Unavailable: the kernel does not say which pages are huge.
    """
    found = 0
    try:
        with (
            memfd.open("r+b") as file,
            mmap.mmap(file.fileno(), 0) as memory,
            open("/proc/self/pagemap", "rb", 0) as frames,
            open("/proc/kpageflags", "rb", 0) as flags,
        ):
            first = ctypes.addressof(ctypes.c_char.from_buffer(memory)) // mmap.PAGESIZE
            for page in _present(file.fileno()):
                memory[page * mmap.PAGESIZE]  # its frame is only known where it is mapped
                (frame,) = struct.unpack("<Q", os.pread(frames.fileno(), 8, (first + page) * 8))
                (flag,) = struct.unpack("<Q", os.pread(flags.fileno(), 8, (frame & _FRAME) * 8))
                found += mmap.PAGESIZE * bool(flag & _TRANSPARENT_HUGE)
    except (OSError, struct.error) as err:
        raise Unavailable(f"the kernel does not say which pages are huge: {err}") from err
    return found


def _present(memfd: int) -> Iterator[int]:
    """The numbers of the pages that there are."""
    start = 0
    with contextlib.suppress(OSError):  # ENXIO: no more of them
        while True:
            start = os.lseek(memfd, start, os.SEEK_DATA)
            end = os.lseek(memfd, start, os.SEEK_HOLE)
            yield from range(start // mmap.PAGESIZE, end // mmap.PAGESIZE)
            start = end


@contextlib.contextmanager
def _setting(file: Path) -> Iterator[str]:
    """
    Read a setting, and put it back at the end. Another run of the tests that wants it changed waits until then.

    :raises Unavailable: there is no such setting, or it cannot be changed.
    """
    with contextlib.ExitStack() as at_the_end:
        try:
            fcntl.flock(at_the_end.enter_context(file.open()), fcntl.LOCK_EX)
            text = file.read_text()
            chosen = re.search(r"\[(\w+)\]", text)
            before = chosen[1] if chosen else text.strip()
            file.write_text(before)
        except OSError as err:
            raise Unavailable(f"{file} cannot be set here: {err.strerror}") from err
        at_the_end.callback(file.write_text, before)
        yield before
