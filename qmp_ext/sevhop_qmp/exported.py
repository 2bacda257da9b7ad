"""
Variables that a QEMU exports, read from its memory: for the few that no monitor command reports.

QEMU exports its global symbols to its modules, so they are in the dynamic symbol table of the program, which is mapped
at an address in ``/proc/PID/maps``.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from .errors import ProcessError
from .process import MemoryMapping, QemuProcess

_ELF64_LITTLE = b"\x7fELF\x02\x01"
# elf(5). Of the header: e_type, e_shoff, e_shentsize, e_shnum.
_HEADER = struct.Struct("<16xH22xQ10xHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
#: ET_DYN: a position-independent program; its symbols are offsets from where it is mapped.
_SHARED = 3
#: Of a note: lengths of name and content, type. The build ID is one of GNU's.
_NOTE = struct.Struct("<III")
_NOTES, _BUILD_ID = 7, 3
_GNU = b"GNU\0"
#: endbr64, mov DISTANCE(%rip),%eax, ret: what a compiler makes of ``return variable``.
_RETURNS_VARIABLE = re.compile(rb"(?:\xf3\x0f\x1e\xfa)?\x8b\x05(?P<distance>.{4})\xc3", re.DOTALL)
_CODE = 16
_FUNCTION = 2
# The table by which the dynamic loader finds a symbol (ld(1), ``--hash-style=gnu``): numbers of buckets, of the first
# symbol in it, and of words of a filter, which is not used here; then these, the buckets, and a hash for each symbol.
_GNU_HASH = 0x6FFFFFF6
_HASH_HEADER = struct.Struct("<IIII")
_HASH = struct.Struct("<I")
_WORD, _HASH_OF_NOTHING = 8, 5381
_INT = struct.Struct("<i")


def read_ints(process: QemuProcess, variables: Mapping[str, str]) -> dict[str, int]:
    """
    The values of variables of type ``int``. Those that cannot be found in this QEMU are omitted.

    :param variables: for each, the exported symbol: the variable, or a function that does nothing but return it.
    :raises ProcessError: the process has exited, or permission is denied.
    """
    wanted = {symbol.encode() for symbol in variables.values()}
    for mapping in _programs(process):
        found = _addresses(process, mapping, wanted)
        if not found:
            continue
        values = {}
        with process.memory() as memory:
            for name, symbol in variables.items():
                if symbol.encode() not in found:
                    continue
                offset, is_function = found[symbol.encode()]
                address = mapping.start + offset
                if is_function and not (address := _returned(os.pread(memory, _CODE, address), address)):
                    continue
                raw = os.pread(memory, _INT.size, address)
                if len(raw) == _INT.size:
                    values[name] = _INT.unpack(raw)[0]
        return values
    return {}


def addresses(process: QemuProcess, symbols: Iterable[str]) -> dict[str, int]:
    """
    Where a QEMU has functions and variables that it exports, in its memory. Those that it does not export are omitted.

    :raises ProcessError: the process has exited, or permission is denied.
    """
    wanted = {symbol.encode() for symbol in symbols}
    for mapping in _programs(process):
        if found := _addresses(process, mapping, wanted):
            return {name.decode(): mapping.start + offset for name, (offset, _) in found.items()}
    return {}


def build_id(process: QemuProcess) -> str:
    """
    The build ID of its program, in hexadecimal (ld(1), ``--build-id``); empty if it was linked without one.

    :raises ProcessError: the process has exited, or permission is denied.
    """
    try:
        with (
            open(f"/proc/{process.pid}/exe", "rb") as file,
            mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as text,
        ):
            for section in _sections(text):
                at, end = section[4], section[4] + section[5]
                while section[1] == _NOTES and at < end:
                    name_size, size, kind = _NOTE.unpack_from(text, at)
                    name = at + _NOTE.size
                    content = name + _aligned(name_size)
                    if (text[name : name + name_size], kind) == (_GNU, _BUILD_ID):
                        return text[content : content + size].hex()
                    at = content + _aligned(size)
    except (struct.error, IndexError):
        pass  # this is no program
    except (OSError, ValueError) as err:
        if not process.alive:
            raise ProcessError(f"process {process.pid} has exited") from err
        raise ProcessError(
            f"/proc/{process.pid}/exe cannot be read: {getattr(err, 'strerror', None) or 'it is no program'}"
        ) from err
    return ""


def _aligned(size: int) -> int:
    return size + 3 & ~3


def _returned(code: bytes, address: int) -> int:
    """The address of the variable that a function returns; 0 if it does more than that."""
    if (match := _RETURNS_VARIABLE.match(code)) is None:
        return 0
    (distance,) = _INT.unpack(match["distance"])
    return int(address + match.end("distance") + distance)


def _programs(process: QemuProcess) -> Iterator[MemoryMapping]:
    """Where programs are mapped: its executable, or what that has loaded if it is a loader."""
    for mapping in process.mappings():
        name = mapping.path.rpartition("/")[2]
        if mapping.offset == 0 and (mapping.path == process.executable or name.startswith("qemu")):
            yield mapping


def _addresses(process: QemuProcess, mapping: MemoryMapping, names: set[bytes]) -> dict[bytes, tuple[int, bool]]:
    """Offsets of symbols from the beginning of a mapped program, and whether they are functions."""
    path = Path(f"/proc/{process.pid}/exe")  # which its own user may open as well
    if mapping.path != process.executable:
        path = Path(f"/proc/{process.pid}/map_files/{mapping.start:x}-{mapping.end:x}")
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as text:
            return _symbols(text, names)
    except (struct.error, IndexError):
        return {}  # this is no program
    except (OSError, ValueError) as err:
        if not process.alive:
            raise ProcessError(f"process {process.pid} has exited") from err
    return {}


def _sections(text: mmap.mmap) -> list[tuple[int, ...]]:
    _, first, size, count = _HEADER.unpack_from(text)
    return [_SECTION.unpack_from(text, first + size * number) for number in range(count)]


def _symbols(text: mmap.mmap, names: set[bytes]) -> dict[bytes, tuple[int, bool]]:
    if text[: len(_ELF64_LITTLE)] != _ELF64_LITTLE:
        return {}
    kind = _HEADER.unpack_from(text)[0]
    sections = _sections(text)
    index = next((section for section in sections if section[1] == _GNU_HASH), None)
    if index is None or kind != _SHARED:
        return {}
    table = sections[index[6]]
    strings = sections[table[6]]
    found: dict[bytes, tuple[int, bool]] = {}
    for wanted in names:
        for number in _candidates(text, index[4], wanted):
            name, info, _, _, value, _ = _SYMBOL.unpack_from(text, table[4] + number * _SYMBOL.size)
            at = strings[4] + name
            if value and text[at : at + len(wanted) + 1] == wanted + b"\0":
                found[wanted] = value, info & 0xF == _FUNCTION
                break
    return found


def _candidates(text: mmap.mmap, at: int, name: bytes) -> Iterator[int]:
    """
    The numbers of the symbols whose name may be this one: as the dynamic loader finds them, since to read all of the
    tens of thousands that a QEMU has takes Python 20 ms.
    """
    buckets, first, words, _ = _HASH_HEADER.unpack_from(text, at)
    heads = at + _HASH_HEADER.size + words * _WORD
    wanted = _HASH_OF_NOTHING
    for byte in name:
        wanted = (wanted * 33 + byte) & 0xFFFFFFFF
    (number,) = _HASH.unpack_from(text, heads + wanted % buckets * _HASH.size)
    chain = heads + buckets * _HASH.size
    while number >= first:
        (hashed,) = _HASH.unpack_from(text, chain + (number - first) * _HASH.size)
        if hashed | 1 == wanted | 1:
            yield number
        if hashed & 1:  # the last one of this bucket
            return
        number += 1
