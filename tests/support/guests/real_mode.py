"""
The bare-metal counter for SEV guests in the lab, ``real_mode.S``: what it does and why it exists is described there.

It is judged like the other counter.
"""

from __future__ import annotations

from pathlib import Path

from . import build

_SOURCE = Path(__file__).with_name("real_mode.S")

#: u64, little endian: the counter.
COUNTER = 0x9000
#: u32: the number of the last line.
LINE = 0x9008
#: u32: how often memory was not what it should be.
BAD_LINES = 0x900C
#: u32: MAGIC once the guest counts.
MAGIC_AT = 0x9010
MAGIC = 0x746E6F63
#: First and next byte after the memory that the guest checks.
PATTERN = 0x20000
PATTERN_END = 0x80000


def firmware() -> Path:
    """
    The image for ``-bios``, assembled if need be.

    :raises build.Unavailable: no assembler.
    """
    return build.firmware("real-mode.bin", _SOURCE)
