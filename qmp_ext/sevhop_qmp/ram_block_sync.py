"""
Private RAM blocks, copied from a source to a destination.

They are synced once before the source stops, and after the stop whatever has changed since.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple

from .errors import RamError
from .process import QemuProcess
from .ram_blocks import RamBlock

#: Blocks are compared and written in pieces of this many bytes.
CHUNK = 64 * 1024


class RamBlockCopy(NamedTuple):
    """A copy of a block: (offset, content) of each part that has pages. The rest is zero."""

    block: RamBlock
    parts: tuple[tuple[int, bytes], ...]


class RamBlockSync:
    """
    Syncs private blocks from a source to a destination: everything once, then only what has changed.

    The first call of :meth:`sync` may run beside the running guest; the last one must come after the source has
    stopped and before the destination runs.
    """

    def __init__(
        self, source: QemuProcess, destination: QemuProcess, pairs: Iterable[tuple[RamBlock, RamBlock]]
    ) -> None:
        self._source = source
        self._destination = destination
        self._pairs = list(pairs)
        self._synced: dict[str, bytearray] = {}

    def sync(self) -> int:
        """
        Bring the destination's blocks up to date.

        :return: bytes written.
        :raises RamError: a block could not be read or written in full.
        """
        written = 0
        with self._source.memory() as read_fd, self._destination.memory(write=True) as write_fd:
            for ours, theirs in self._pairs:
                try:
                    # Most of a large block is often untouched, video memory above all. A page that neither process
                    # has ever touched is zero in both, and reading it would allocate it.
                    areas = self._source.populated(ours.host, ours.used)
                    image = self._synced.get(ours.name)
                    if image is None:
                        own = self._destination.populated(theirs.host, theirs.used)
                        image = self._synced[ours.name] = bytearray(theirs.used)
                        for start, end in own:
                            image[start:end] = read_area(write_fd, theirs.host + start, end - start)
                        areas += own
                    for start, end in areas:
                        now = read_area(read_fd, ours.host + start, end - start)
                        if now != image[start:end]:
                            written += _write_changes(write_fd, theirs.host + start, image[start:end], now)
                            image[start:end] = now
                except OSError as err:
                    raise RamError(f"cannot copy RAM block {ours.name}: {err.strerror}") from err
        return written

    def copies(self) -> list[RamBlockCopy]:
        """What was synced so far, for another destination: the source may have exited by then."""
        return [RamBlockCopy(ours, ((0, bytes(self._synced[ours.name])),)) for ours, _ in self._pairs]


def write(copies: Iterable[tuple[RamBlockCopy, RamBlock]], destination: QemuProcess) -> int:
    """
    Write copies of the source's blocks into those of a destination that does not run.

    :return: bytes written.
    :raises RamError: a block could not be written in full.
    """
    written = 0
    with destination.memory(write=True) as fd:
        for theirs, ours in copies:
            wanted, found = bytearray(ours.used), bytearray(ours.used)
            for start, content in theirs.parts:
                wanted[start : start + len(content)] = content
            try:
                areas = destination.populated(ours.host, ours.used)
                for start, end in areas:
                    found[start:end] = read_area(fd, ours.host + start, end - start)
                for start, end in [*areas, *((start, start + len(content)) for start, content in theirs.parts)]:
                    now = bytes(wanted[start:end])
                    written += _write_changes(fd, ours.host + start, found[start:end], now)
                    found[start:end] = now
            except OSError as err:
                raise RamError(f"cannot copy RAM block {ours.name}: {err.strerror}") from err
    return written


def read_area(fd: int, address: int, count: int) -> bytes:
    """:raises RamError: only a part of it can be read."""
    data = os.pread(fd, count, address)
    if len(data) != count:
        raise RamError(f"cannot read a RAM block: {len(data)} of {count} bytes are there")
    return data


def _write_changes(fd: int, address: int, before: bytearray, now: bytes) -> int:
    written = 0
    new = memoryview(now)
    for start in range(0, len(now), CHUNK):
        piece = new[start : start + CHUNK]
        if piece != memoryview(before)[start : start + CHUNK]:
            written += os.pwrite(fd, piece, address + start)
    return written
