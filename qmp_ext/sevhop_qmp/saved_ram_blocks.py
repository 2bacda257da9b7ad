"""Copies of a source's private RAM blocks, in a memfd that outlives it."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterable, Iterator

from .errors import RamError
from .process import QemuProcess
from .ram_block_sync import RamBlockCopy, read_area
from .ram_blocks import RamBlock


def copy(process: QemuProcess, blocks: Iterable[RamBlock]) -> dict[str, RamBlockCopy]:
    """
    Copy the private blocks of a stopped process, by name.

    :raises RamError: a block could not be read in full.
    """
    copies = {}
    with process.memory() as fd:
        for block in blocks:
            if block.inode is None:
                try:
                    areas = process.populated(block.host, block.used)
                    parts = tuple((start, read_area(fd, block.host + start, end - start)) for start, end in areas)
                except OSError as err:
                    raise RamError(f"cannot copy RAM block {block.name}: {err.strerror}") from err
                copies[block.name] = RamBlockCopy(block, parts)
    return copies


def pack(copies: Iterable[RamBlockCopy]) -> int:
    """
    Write copies into a memfd, one after the other in their order. What is zero takes no memory.

    :return: its descriptor, which is the caller's.
    :raises RamError: there is no memory for it.
    """
    fd = os.memfd_create("sevhop-ram-blocks", os.MFD_CLOEXEC)
    try:
        at = 0
        for item in copies:
            os.ftruncate(fd, at + _pages(item.block))
            for start, content in item.parts:
                if os.pwrite(fd, content, at + start) != len(content):
                    raise RamError(f"cannot copy RAM block {item.block.name}: short write")
            at += _pages(item.block)
    except OSError as err:
        os.close(fd)
        raise RamError(f"cannot copy RAM blocks: {err.strerror}") from err
    except BaseException:
        os.close(fd)
        raise
    return fd


def unpack(fd: int, blocks: Iterable[RamBlock]) -> dict[str, RamBlockCopy]:
    """
    Copies from such a memfd, by name.

    :param blocks: those that :func:`copy` was given, in the same order.
    :raises RamError: something is missing.
    """
    copies = {}
    at = 0
    for block in blocks:
        if block.inode is None:
            parts = tuple(
                (start - at, read_area(fd, start, end - start)) for start, end in _data(fd, at, at + block.used)
            )
            copies[block.name] = RamBlockCopy(block, parts)
            at += _pages(block)
    return copies


def _pages(block: RamBlock) -> int:
    page = resource.getpagesize()
    return -(-block.used // page) * page


def _data(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Those parts of a range of a file that are not holes (lseek(2))."""
    while start < end:
        try:
            start = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as err:
            if err.errno == errno.ENXIO:
                return
            raise
        if start < end:
            hole = min(os.lseek(fd, start, os.SEEK_HOLE), end)
            yield start, hole
            start = hole
