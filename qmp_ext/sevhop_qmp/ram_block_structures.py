"""
Where RAM blocks are in a QEMU before version 8, which does not report their host addresses.

They are found in QEMU's own ``RAMBlock`` structures, which are verified field by field and never guessed.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

from .errors import RamError
from .process import MemoryMapping, QemuProcess
from .ram_block_table import UNKNOWN_HINT, Row

# A part of struct RAMBlock (include/exec/ramblock.h, QEMU 2.9 to 11): host, colo_cache, offset, used_length,
# max_length, resized, flags, idstr, next.
_STRUCTURE = struct.Struct("<Q8xQQQ12x256s4xQQ")
_STRUCTURE_AT = 24
_NAME_AT = 76
_NEXT_AT = 336
#: Bytes of a heap that are searched at a time.
_PIECE = 1 << 20
#: Blocks that a QEMU has at most, with those that have no name.
_MOST_BLOCKS = 4096


def locate(rows: list[Row], process: QemuProcess) -> list[Row]:
    """
    Complete the rows with host addresses from the RAMBlock structures on the process's heap. These are a list, in the
    same order, so only the first is searched for: a heap may be large, and a guest may be waiting.

    :raises RamError: they were not found there.
    """
    with process.memory() as mem:
        for heap in process.mappings():
            if heap.path != "[heap]":
                continue
            for block in _candidates(mem, heap, os.fsencode(rows[0].name) + b"\0"):
                hosts = _hosts(mem, block, rows)
                if hosts is not None:
                    return [row._replace(host=host) for row, host in zip(rows, hosts, strict=True)]
    raise RamError(f"cannot find RAM block {rows[0].name} and those after it in QEMU's memory", UNKNOWN_HINT)


def _candidates(mem: int, heap: MemoryMapping, name: bytes) -> Iterator[int]:
    """Addresses of possible RAMBlocks of this name."""
    for start in range(heap.start, heap.end, _PIECE):
        try:
            # What begins in this piece may end in the next one.
            piece = os.pread(mem, _PIECE + len(name) - 1, start)
        except OSError:
            return  # the heap has shrunk, or its process has exited
        at = piece.find(name)
        while at >= 0:
            yield start + at - _NAME_AT
            at = piece.find(name, at + 1)


def _hosts(mem: int, block: int, rows: list[Row]) -> list[int] | None:
    """The addresses of all rows, if this is the first of their structures and the others follow it; otherwise None."""
    hosts: list[int] = []
    previous = 0
    for _ in range(_MOST_BLOCKS):
        try:
            host, offset, used, size, name, behind, back = _STRUCTURE.unpack(
                os.pread(mem, _STRUCTURE.size, block + _STRUCTURE_AT)
            )
        except (OSError, OverflowError, struct.error):
            return None
        if previous and back != previous + _NEXT_AT:
            return None
        # A block without a name belongs to a backend that the guest does not use, and is in no row.
        if name := name.partition(b"\0")[0]:
            row = rows[len(hosts)]
            if (name, offset, used, size) != (os.fsencode(row.name), row.offset, row.used, row.size):
                return None
            hosts.append(host)
            if len(hosts) == len(rows):
                return hosts
        previous, block = block, behind
    return None
