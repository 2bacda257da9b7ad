"""What a guest's memory can have from the host only if the host is asked first: huge pages. All is put back."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from .build import Unavailable

_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
_TRANSPARENT = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


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


def transparent_in_memfds() -> int:
    """Bytes of all the host's memfds and tmpfs that are huge pages."""
    return int(re.findall(r"ShmemHugePages: +(\d+) kB", Path("/proc/meminfo").read_text())[0]) << 10


@contextlib.contextmanager
def _setting(file: Path) -> Iterator[str]:
    """
    Read a setting, and put it back at the end.

    :raises Unavailable: there is no such setting, or it cannot be changed.
    """
    try:
        text = file.read_text()
        chosen = re.search(r"\[(\w+)\]", text)
        before = chosen[1] if chosen else text.strip()
        file.write_text(before)
    except OSError as err:
        raise Unavailable(f"{file} cannot be set here: {err.strerror}") from err
    try:
        yield before
    finally:
        file.write_text(before)
