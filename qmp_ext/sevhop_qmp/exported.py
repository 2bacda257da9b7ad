"""
Variables that a QEMU exports, read from outside: for the little that it tells by no monitor.

QEMU exports its global symbols to its modules, so they are in the dynamic symbol table of the program, which is mapped
at an address that ``/proc/PID/maps`` tells.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import ProcessError
from .process import MemoryMapping, QemuProcess

_ELF64_LITTLE = b"\x7fELF\x02\x01"
# elf(5). Of the header: e_type, e_shoff, e_shentsize, e_shnum.
_HEADER = struct.Struct("<16xH22xQ10xHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
#: A program that may be anywhere in memory; its symbols are counted from where it begins.
_SHARED = 3
_DYNSYM = 11
#: Bytes of the longest name that is sought.
_NAME = 64
_INT = struct.Struct("<i")


def read_ints(process: QemuProcess, names: Iterable[str]) -> dict[str, int]:
    """
    The values of exported variables of type ``int``. One that this QEMU does not export is left out.

    :raises ProcessError: the process has ended, or we may not look.
    """
    wanted = {name.encode(): name for name in names}
    for mapping in _programs(process):
        found = _addresses(process, mapping, set(wanted))
        if not found:
            continue
        values = {}
        with process.memory() as memory:
            for name, offset in found.items():
                raw = os.pread(memory, _INT.size, mapping.start + offset)
                if len(raw) == _INT.size:
                    values[wanted[name]] = _INT.unpack(raw)[0]
        return values
    return {}


def _programs(process: QemuProcess) -> Iterator[MemoryMapping]:
    """Where programs begin in its memory: that of its executable, unless that is a loader; then what it has loaded."""
    for mapping in process.mappings():
        name = mapping.path.rpartition("/")[2]
        if mapping.offset == 0 and (mapping.path == process.executable or name.startswith("qemu")):
            yield mapping


def _addresses(process: QemuProcess, mapping: MemoryMapping, names: set[bytes]) -> dict[bytes, int]:
    """Offsets of symbols from the beginning of a mapped program."""
    path = Path(f"/proc/{process.pid}/map_files/{mapping.start:x}-{mapping.end:x}")
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as text:
            return _symbols(text, names)
    except (struct.error, IndexError):
        return {}  # this is no program
    except (OSError, ValueError) as err:
        if not process.alive:
            raise ProcessError(f"process {process.pid} has ended") from err
    return {}


def _symbols(text: mmap.mmap, names: set[bytes]) -> dict[bytes, int]:
    if text[: len(_ELF64_LITTLE)] != _ELF64_LITTLE:
        return {}
    kind, first, size, count = _HEADER.unpack_from(text)
    sections = [_SECTION.unpack_from(text, first + size * number) for number in range(count)]
    table = next(section for section in [*sections, None] if section is None or section[1] == _DYNSYM)
    if table is None or kind != _SHARED:
        return {}
    _, _, _, _, offset, length, strings, _, _, _ = table
    base = sections[strings][4]
    found: dict[bytes, int] = {}
    for name, _, _, _, value, _ in _SYMBOL.iter_unpack(text[offset : offset + length]):
        at = base + name
        end = text.find(b"\0", at, at + _NAME)
        if end > 0 and value and text[at:end] in names:
            found[text[at:end]] = value
            if len(found) == len(names):
                break
    return found
