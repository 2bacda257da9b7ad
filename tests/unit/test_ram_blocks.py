"""RAM blocks: QEMU's table, and which blocks are copied."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
from sevhop.keeper.handover import SourceHandles
from sevhop_qmp.errors import RamError
from sevhop_qmp.monitor import Commands
from sevhop_qmp.process import MemoryMapping, QemuProcess
from sevhop_qmp.ram_block_table import parse_ramblock_table
from sevhop_qmp.ram_blocks import RamBlock, private_pairs, read

QEMU_7 = """\
              Block Name    PSize              Offset               Used              Total
                    ram0    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000
    /rom@etc/acpi/tables    4 KiB  0x0000000005100000 0x0000000000020000 0x0000000000200000
"""
QEMU_10 = """\
              Block Name    PSize              Offset               Used              Total                HVA  RO
                    ram0    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000 0x00007f28e3e00000  rw
                 pc.bios    4 KiB  0x0000000004000000 0x0000000000040000 0x0000000000040000 0x00007f28e7c00000  ro
"""


def test_table_of_old_qemu_has_no_addresses() -> None:
    rows = parse_ramblock_table(QEMU_7)
    assert [row.name for row in rows] == ["ram0", "/rom@etc/acpi/tables"]
    assert rows[1].used == 0x20000
    assert rows[1].size == 0x200000
    assert rows[0].host is None


def test_table_of_new_qemu_has_addresses() -> None:
    rows = parse_ramblock_table(QEMU_10)
    assert rows[1].host == 0x7F28E7C00000
    assert rows[1].name == "pc.bios"


@pytest.mark.parametrize(
    "text", ["", "unknown command: 'info ramblock'", QEMU_7 + "ram1 4 KiB\n", QEMU_7 + "x y z 1 2 size\n"]
)
def test_ram_block_table_is_refused_if_invalid(text: str) -> None:
    with pytest.raises(RamError):
        parse_ramblock_table(text)


#: Where the heap of a QEMU without addresses is, with room in front.
HEAP = 1 << 24
#: Bytes of a struct RAMBlock up to the end of its list entry.
STRUCTURE = 352


class Old(Commands):
    """A QEMU that does not report addresses, and its process: a heap with RAMBlock structures in it."""

    def __init__(self, *names: str) -> None:
        self.name = "old"
        self.blocks = [(name, number << 20, (number + 1) << 12) for number, name in enumerate(names)]
        #: Where the structures are, each.
        self.places = [HEAP + (number * 3 % 7 << 19) + 8 * number for number in range(len(names))]
        self._fd = os.memfd_create("heap")
        os.ftruncate(self._fd, HEAP + (8 << 20))

    @property
    def version(self) -> str:
        return "7.2.0"

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float | None = None
    ) -> Any:
        rows = [f"{name} 4 KiB {offset:#x} {size:#x} {size:#x}" for name, offset, size in self.blocks if name]
        return "\n".join([QEMU_7.splitlines()[0], *rows])

    async def add_fd(self, fd: int) -> tuple[int, int]:
        raise NotImplementedError

    @contextmanager
    def memory(self) -> Iterator[int]:
        yield self._fd

    def mappings(self) -> list[MemoryMapping]:
        # Another heap, which is not there any more.
        gone = MemoryMapping(-(1 << 30), -(1 << 30) + 4096, "rw-p", 0, "00:00", 0, "[heap]")
        heap = MemoryMapping(HEAP, HEAP + (8 << 20), "rw-p", 0, "00:00", 0, "[heap]")
        data = MemoryMapping(1 << 40, 2 << 40, "rw-p", 0, "00:00", 0, "")
        return [data, gone, heap]

    def fill(self, **wrong: int) -> None:
        """Write the structures. A keyword is a field that is wrong in the last one, and what is to be added to it."""
        for number, ((name, offset, size), place) in enumerate(zip(self.blocks, self.places, strict=True)):
            last = number == len(self.blocks) - 1
            fields = {
                "offset": offset,
                "used": size,
                "size": size,
                "behind": 0 if last else self.places[number + 1],
                "back": self.places[number - 1] + 336 if number else 0xDEAD,
            }
            for field, more in wrong.items() if last else ():
                fields[field] += more
            numbers = (self.host(number), 0, fields["offset"], fields["used"], fields["size"], 0xF00, 0)
            structure = struct.pack("<24x7Q", *numbers)[:76] + struct.pack(
                "<256s4xQQ", name.encode(), fields["behind"], fields["back"]
            )
            assert len(structure) == STRUCTURE
            os.pwrite(self._fd, structure, place)

    @staticmethod
    def host(number: int) -> int:
        return (1 << 40) + (number << 30)

    def copy(self, number: int, place: int) -> None:
        """As if a block had been freed, and its memory not used again."""
        os.pwrite(self._fd, os.pread(self._fd, STRUCTURE, self.places[number]), place)

    def read(self) -> dict[str, int]:
        blocks = asyncio.run(read(self, self))  # type: ignore[arg-type]
        os.close(self._fd)
        return {name: block.host for name, block in blocks.items()}


def test_blocks_of_an_old_qemu_are_found_on_its_heap() -> None:
    old = Old("pc.ram", "vga.vram", "", "pc.bios")
    # The first name crosses the end of a piece that is searched.
    old.places[0] = HEAP + (2 << 20) - 76 - 3
    old.fill()
    old.copy(0, HEAP + 64)
    old.copy(1, HEAP + 4096)
    assert old.read() == {"pc.ram": old.host(0), "vga.vram": old.host(1), "pc.bios": old.host(3)}


@pytest.mark.parametrize("field", ["offset", "used", "size", "back"])
def test_structures_are_refused_unless_they_match_the_table(field: str) -> None:
    old = Old("pc.ram", "vga.vram", "pc.bios")
    old.fill(**{field: 8})
    with pytest.raises(RamError, match=r"cannot find RAM block pc\.ram and those after it"):
        old.read()


@pytest.mark.parametrize("behind", [0, 3, HEAP + (8 << 20) - 100, 1 << 62, (1 << 64) - 8])
def test_broken_list_is_refused(behind: int) -> None:
    old = Old("pc.ram", "")
    old.fill(behind=behind)
    old.blocks.append(("pc.bios", 0, 4096))
    with pytest.raises(RamError, match="cannot find RAM block"):
        old.read()


def test_endless_list_is_refused() -> None:
    old = Old("pc.ram", "", "")
    old.places[2] = old.places[1]
    old.fill(behind=old.places[1], back=0)
    old.blocks.append(("pc.bios", 0, 4096))
    with pytest.raises(RamError, match="cannot find RAM block"):
        old.read()


def test_populated_returns_only_ranges_that_have_pages() -> None:
    page = mmap.PAGESIZE
    me = QemuProcess.open(os.getpid())
    with contextlib.closing(me), mmap.mmap(-1, 8 * page) as memory:
        start = ctypes.addressof(pointer := ctypes.c_char.from_buffer(memory))
        assert me.populated(start, 8 * page) == []
        for number in (0, 2, 3, 7):
            memory[number * page] = 1
        assert me.populated(start, 8 * page) == [(0, page), (2 * page, 4 * page), (7 * page, 8 * page)]
        assert me.populated(start, 7 * page + 5) == [(0, page), (2 * page, 4 * page), (7 * page, 7 * page + 5)]
        del pointer  # a mapping that is referred to cannot be closed


def block(name: str, *, used: int = 4096, inode: int = 0, shared: bool = False) -> RamBlock:
    return RamBlock(name, 0x1000, used, used, ("00:01", inode) if inode else None, shared)


def by_name(*blocks: RamBlock) -> dict[str, RamBlock]:
    return {b.name: b for b in blocks}


def test_shared_blocks_are_not_copied() -> None:
    ram = block("ram0", inode=5, shared=True)
    bios = block("pc.bios")
    assert private_pairs(by_name(ram, bios), by_name(ram, bios)) == [(bios, bios)]


def test_private_mapping_of_the_same_memfd_is_shared_memory() -> None:
    assert private_pairs(by_name(block("r", inode=5, shared=True)), by_name(block("r", inode=5))) == []


@pytest.mark.parametrize(
    "theirs",
    [
        by_name(),
        by_name(block("r", inode=6, shared=True)),
        by_name(block("r", used=8192, inode=5, shared=True)),
        by_name(block("r")),
    ],
)
def test_destination_with_other_memory_is_refused(theirs: dict[str, RamBlock]) -> None:
    with pytest.raises(RamError):
        private_pairs(by_name(block("r", inode=5, shared=True)), theirs)


def test_block_of_another_length_is_refused_unless_regenerated() -> None:
    with pytest.raises(RamError):
        private_pairs(by_name(block("pc.bios", used=4096)), by_name(block("pc.bios", used=8192)))
    tables = "/rom@etc/acpi/tables"
    assert private_pairs(by_name(block(tables, used=4096)), by_name(block(tables, used=8192))) == []


def test_encrypted_blocks_are_not_copied() -> None:
    blocks = by_name(block("pc.bios"), block("vga.vram"))
    pairs = private_pairs(blocks, blocks, encrypted=frozenset({"pc.bios"}))
    assert [ours.name for ours, _ in pairs] == ["vga.vram"]


PAGE = mmap.PAGESIZE


class Reporting(Commands):
    """A QEMU that reports that it has one RAM block."""

    def __init__(self, host: int, size: int) -> None:
        self.name = "reported"
        header = QEMU_10.splitlines()[0]
        self._table = f"{header}\nm 4 KiB {0:#x} {size:#x} {size:#x} {host:#x} rw\n"

    @property
    def version(self) -> str:
        return "10.0.0"

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float | None = None
    ) -> Any:
        return self._table

    async def add_fd(self, fd: int) -> tuple[int, int]:
        raise NotImplementedError


def read_block(host: int, size: int) -> RamBlock:
    """What is made of it, this test being the QEMU."""
    process = QemuProcess.open(os.getpid())
    try:
        return asyncio.run(read(Reporting(host, size), process))["m"]
    finally:
        process.close()


@contextmanager
def mapped(pages: int, fd: int = -1) -> Iterator[int]:
    """Memory with a guard page after it."""
    with mmap.mmap(-1, (pages + 1) * PAGE) as around:
        address = ctypes.addressof(pointer := ctypes.c_char.from_buffer(around))
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        words = (ctypes.c_void_p(address), ctypes.c_size_t(pages * PAGE), mmap.PROT_READ | mmap.PROT_WRITE)
        kind = mmap.MAP_SHARED if fd >= 0 else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        assert libc.mmap(*words, kind | 0x10, fd, ctypes.c_long(0)) == address  # MAP_FIXED
        assert libc.mprotect(ctypes.c_void_p(address + pages * PAGE), ctypes.c_size_t(PAGE), 0) == 0
        yield address
        del pointer


def test_block_is_as_long_as_what_is_mapped() -> None:
    fd = os.memfd_create("memory-backend-memfd")
    os.ftruncate(fd, 4 * PAGE)
    with mapped(4, fd) as shared, mapped(4) as private:
        assert read_block(shared, 4 * PAGE).shared
        assert read_block(private + PAGE, 3 * PAGE).inode is None
        for host, size in ((shared, 5), (shared + PAGE, 4), (private, 5), (private, 1 << 40)):
            with pytest.raises(RamError, match="are mapped there"):
                read_block(host, size * PAGE)
    os.close(fd)


def test_block_is_as_long_as_its_memfd() -> None:
    fd = os.memfd_create("memory-backend-memfd")
    os.ftruncate(fd, 4 * PAGE)
    process = QemuProcess.open(os.getpid())
    with mapped(4, fd) as shared:
        block = read_block(shared, 4 * PAGE)
        SourceHandles.take_machine(process, [block]).close()
        for pages in (3, 5):
            os.ftruncate(fd, pages * PAGE)
            with pytest.raises(RamError, match=f"but its memfd has {pages * PAGE}"):
                SourceHandles.take_machine(process, [block])
    process.close()
    os.close(fd)
