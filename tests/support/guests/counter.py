"""
The bare-metal counter, ``counter.S``: what it prints and keeps in memory is described there.

The addresses are guest-physical; the guest's memory starts at 0 and has no hole below 2 GiB, so they are offsets in
its memory backend as well.
"""

from __future__ import annotations

from pathlib import Path

from . import build

_SOURCE = Path(__file__).with_name("counter.S")

#: u64, little endian: the counter.
COUNTER = 0x200000
#: u32: the number of the last line.
LINE = 0x200008
#: u32: how often memory was not what it should be.
BAD_LINES = 0x20000C
#: u32: MAGIC once the guest counts.
MAGIC_AT = 0x200010
MAGIC = 0x746E6F63
#: First and next byte after the memory that the guest checks.
PATTERN = 0x400000
PATTERN_END = 0x500000
#: The least memory it runs with.
MEMORY_MIB = 16


def firmware(*, idle: bool = False) -> Path:
    """
    The image for ``-bios``, assembled if need be.

    :param idle: it counts 16 thousand times a second instead of as fast as it can, and waits for interrupts in
        between: a processor of the host has little to do with it. Not for KVM in the lab: there `hlt` ended without
        an interrupt, and once no interrupt came at all.
    :raises build.Unavailable: no assembler.
    """
    return build.firmware("idle-counter.bin", _SOURCE, "IDLE") if idle else build.firmware("counter.bin", _SOURCE)
