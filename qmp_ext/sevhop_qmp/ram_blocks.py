"""
The RAM blocks of a QEMU process: which are shared memory and need no copying, and which are private.

``xen-save-devices-state`` writes no RAM at all. The guest's main memory is shared between the two processes; what
is private to each (firmware, option ROMs, video memory, ACPI tables, UEFI variables in pflash) would be stale or
empty in the destination: a reset would hang, and pflash would overwrite newer UEFI variables in its file. So these
blocks are copied: :mod:`sevhop_qmp.ram_block_sync`.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import RamError
from .monitor import Commands
from .process import MemoryMapping, QemuProcess
from .ram_block_structures import locate
from .ram_block_table import UNKNOWN_HINT, Row, parse_ramblock_table

_SAME_MACHINE = "start both with the same machine type, devices and firmware"


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
        rows = locate(rows, process)
    mappings = [mapping for mapping in process.mappings() if mapping.permissions.startswith("r")]
    return {row.name: _describe(row, mappings) for row in rows}


def _describe(row: Row, mappings: list[MemoryMapping]) -> RamBlock:
    """:raises RamError: what is mapped there is not such a block. QEMU's answer alone is not trusted."""
    assert row.host is not None
    behind = next((m for m in mappings if m.start <= row.host < m.end), None)
    if behind is None:
        raise RamError(f"cannot use RAM block {row.name}: it is not mapped where QEMU reports it", UNKNOWN_HINT)
    mapped = _mapped(row.host, behind, mappings)
    if mapped < row.size:
        sizes = f"QEMU reports {row.size} bytes, but {mapped} are mapped there"
        raise RamError(f"cannot use RAM block {row.name}: {sizes}", UNKNOWN_HINT)
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
            raise RamError(f"cannot hand over RAM block {name}: the new QEMU has none of this name", _SAME_MACHINE)
        if block.shared or other.inode is not None:
            if block.inode != other.inode:
                raise RamError(
                    f"cannot hand over RAM block {name}: the new QEMU has other memory for it", _SAME_MACHINE
                )
            if block.size != other.size:
                raise RamError(_sizes(name, block.size, other.size), _SAME_MACHINE)
            continue
        if name in encrypted:
            continue
        if block.used != other.used:
            # Tables that QEMU generates for fw_cfg may differ in length between versions. The destination makes its
            # own again when the guest reads them after a reset, so its copy is as good.
            if name.startswith("/rom@"):
                continue
            raise RamError(_sizes(name, block.used, other.used), _SAME_MACHINE)
        pairs.append((block, other))
    return pairs


def _sizes(name: str, ours: int, theirs: int) -> str:
    return f"cannot hand over RAM block {name}: it has {ours} bytes in the old QEMU, {theirs} in the new one"
