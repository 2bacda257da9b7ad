"""
The RAM blocks of a QEMU process: which are shared memory and need no copying, and which are private.

``xen-save-devices-state`` writes no RAM at all. The guest's main memory is shared between the two processes; what
is private to each (firmware, option ROMs, video memory, ACPI tables, UEFI variables in pflash) would be stale or
empty in the destination: a reset would hang, and pflash would overwrite newer UEFI variables in its file. So these
blocks are synced: once before the source stops, and after the stop whatever has changed since.

Blocks are found by ``info ramblock``. It prints host addresses since QEMU 8; for older ones they are found in
QEMU's own ``RAMBlock`` structures, which are verified field by field and never guessed.
"""

from __future__ import annotations

import errno
import os
import resource
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from .errors import RamError
from .monitor import Commands
from .process import MemoryMapping, QemuProcess

#: Blocks are compared and written in pieces of this many bytes.
CHUNK = 64 * 1024

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


@dataclass(frozen=True)
class RamBlock:
    """
    One RAM block.

    :ivar name: QEMU's id of the block, the same in source and destination.
    :ivar host: where it starts in the process; sizes and address in bytes.
    :ivar used: bytes in use; ``size`` is what it may grow to.
    :ivar inode: (device, inode) of the file behind it; None for private memory.
    :ivar shared: whether writes reach that file.
    """

    name: str
    host: int
    used: int
    size: int
    inode: tuple[str, int] | None
    shared: bool

    @property
    def backend(self) -> str:
        """The id of the memory backend that it belongs to, if it belongs to one: blocks of these have its name."""
        return self.name.removeprefix("/objects/")


async def read(monitor: Commands, process: QemuProcess) -> dict[str, RamBlock]:
    """
    The RAM blocks of a QEMU process, by name.

    :raises RamError: their addresses cannot be determined for certain.
    """
    rows = parse_ramblock_table(await monitor.hmp("info ramblock"))
    if any(row.host is None for row in rows):
        rows = _locate(rows, process)
    mappings = [mapping for mapping in process.mappings() if mapping.permissions.startswith("r")]
    return {row.name: _describe(row, mappings) for row in rows}


@dataclass(frozen=True)
class Row:
    """A line of ``info ramblock``."""

    name: str
    offset: int
    used: int
    size: int
    host: int | None


def parse_ramblock_table(text: str) -> list[Row]:
    """
    Read the table that the HMP command ``info ramblock`` prints.

    :raises RamError: it is not such a table.
    """
    lines = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
    if not lines or not lines[0].split()[:2] == ["Block", "Name"]:
        raise RamError("QEMU's list of RAM blocks has an unknown form")
    with_host = "HVA" in lines[0]
    rows = []
    for line in lines[1:]:
        # The name may contain blanks; the columns after it do not, but for the page size ("4 KiB").
        columns = 6 if not with_host else 8 if lines[0].split()[-1] == "RO" else 7
        words = line.rsplit(None, columns - 1)
        if len(words) == columns - 1:
            continue  # a block without a name belongs to a backend that the guest does not use
        try:
            numbers = [int(word, 16) for word in words[3 : 7 if with_host else 6]]
            if not 0 <= numbers[1] <= numbers[2] < 1 << 64 or max(numbers) >= 1 << 64 or min(numbers) < 0:
                raise ValueError("no process has such a block")
            rows.append(Row(words[0].strip(), numbers[0], numbers[1], numbers[2], numbers[3] if with_host else None))
        except (ValueError, IndexError) as err:
            raise RamError(f"QEMU's list of RAM blocks has an unknown line: {line.strip()}") from err
    return rows


def _locate(rows: list[Row], process: QemuProcess) -> list[Row]:
    """
    Complete the rows with host addresses from the RAMBlock structures on the process's heap. These are a list, in the
    same order, so only the first is searched for: a heap may be large, and a guest may be waiting.
    """
    with process.memory() as mem:
        for heap in process.mappings():
            if heap.path != "[heap]":
                continue
            for block in _candidates(mem, heap, os.fsencode(rows[0].name) + b"\0"):
                hosts = _hosts(mem, block, rows)
                if hosts is not None:
                    return [replace(row, host=host) for row, host in zip(rows, hosts, strict=True)]
    raise RamError(f"RAM block {rows[0].name}, and those after it, were not found in QEMU's memory")


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


def _describe(row: Row, mappings: list[MemoryMapping]) -> RamBlock:
    """:raises RamError: what is mapped there is not such a block. QEMU's answer alone is not trusted."""
    assert row.host is not None
    behind = next((m for m in mappings if m.start <= row.host < m.end), None)
    if behind is None:
        raise RamError(f"RAM block {row.name} is not mapped where QEMU reports it")
    mapped = _mapped(row.host, behind, mappings)
    if mapped < row.size:
        raise RamError(f"QEMU reports that RAM block {row.name} has {row.size} bytes, but {mapped} are mapped there")
    file = (behind.device, behind.inode) if behind.inode else None
    return RamBlock(row.name, row.host, row.used, row.size, file, behind.shared and file is not None)


def _mapped(start: int, first: MemoryMapping, mappings: list[MemoryMapping]) -> int:
    """Bytes from an address on, inside one mapping or several contiguous ones of the same file."""
    end = first.end
    offset = first.offset + end - first.start
    for mapping in mappings:
        same = (mapping.device, mapping.inode, mapping.shared) == (first.device, first.inode, first.shared)
        if same and mapping.start == end and (mapping.offset == offset or not first.inode):
            end, offset = mapping.end, mapping.offset + mapping.end - mapping.start
    return end - start


def private_pairs(
    source: dict[str, RamBlock], destination: dict[str, RamBlock], *, encrypted: frozenset[str] = frozenset()
) -> list[tuple[RamBlock, RamBlock]]:
    """
    Pair the blocks that must be copied, (source's, destination's).

    :param encrypted: names of blocks whose content is tied to its physical page by SEV; they cannot be copied.
    :raises RamError: the two processes do not have the same blocks.
    """
    pairs = []
    for name, block in source.items():
        other = destination.get(name)
        if other is None:
            raise RamError(f"the destination has no RAM block {name}")
        if block.shared or other.inode is not None:
            if block.inode != other.inode:
                raise RamError(f"RAM block {name} is not the same memory in source and destination")
            if block.size != other.size:
                raise RamError(f"RAM block {name} has {block.size} bytes, in the destination {other.size}")
            continue
        if name in encrypted:
            continue
        if block.used != other.used:
            # Tables that QEMU generates for fw_cfg may differ in length between versions. The destination makes its
            # own again when the guest reads them after a reset, so its copy is as good.
            if name.startswith("/rom@"):
                continue
            raise RamError(f"RAM block {name} has {block.used} bytes, in the destination {other.used}")
        pairs.append((block, other))
    return pairs


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
                            image[start:end] = _read(write_fd, theirs.host + start, end - start)
                        areas += own
                    for start, end in areas:
                        now = _read(read_fd, ours.host + start, end - start)
                        if now != image[start:end]:
                            written += _write_changes(write_fd, theirs.host + start, image[start:end], now)
                            image[start:end] = now
                except OSError as err:
                    raise RamError(f"cannot copy RAM block {ours.name}: {err.strerror}") from err
        return written

    def copies(self) -> list[RamBlockCopy]:
        """What was synced so far, for another destination: the source may have exited by then."""
        return [RamBlockCopy(ours, ((0, bytes(self._synced[ours.name])),)) for ours, _ in self._pairs]


def _read(fd: int, address: int, count: int) -> bytes:
    data = os.pread(fd, count, address)
    if len(data) != count:
        raise RamError(f"only {len(data)} of {count} bytes of a RAM block can be read")
    return data


def _write_changes(fd: int, address: int, before: bytearray, now: bytes) -> int:
    written = 0
    new = memoryview(now)
    for start in range(0, len(now), CHUNK):
        piece = new[start : start + CHUNK]
        if piece != memoryview(before)[start : start + CHUNK]:
            written += os.pwrite(fd, piece, address + start)
    return written


@dataclass(frozen=True)
class RamBlockCopy:
    """A copy of a block: (offset, content) of each part that has pages. The rest is zero."""

    block: RamBlock
    parts: tuple[tuple[int, bytes], ...]


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
                    parts = tuple((start, _read(fd, block.host + start, end - start)) for start, end in areas)
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
            parts = tuple((start - at, _read(fd, start, end - start)) for start, end in _data(fd, at, at + block.used))
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
                    found[start:end] = _read(fd, ours.host + start, end - start)
                for start, end in [*areas, *((start, start + len(content)) for start, content in theirs.parts)]:
                    now = bytes(wanted[start:end])
                    written += _write_changes(fd, ours.host + start, found[start:end], now)
                    found[start:end] = now
            except OSError as err:
                raise RamError(f"cannot copy RAM block {ours.name}: {err.strerror}") from err
    return written
