"""
The bare-metal counter for SEV-ES guests in the lab, ``es_counter.S``: what it does is described there.

It is judged like the other counters.
"""

from __future__ import annotations

from pathlib import Path

from . import build
from .machine import C_BIT

_SOURCE = Path(__file__).with_name("es_counter.S")

#: Between two lines, in ticks of the local APIC's timer, which are nanoseconds in KVM. Mostly the guest is halted.
_TIMER = 400_000_000
#: Where the guest expects a secret of its owner, and how that begins; the 8 characters behind are printed.
SECRET_AT = 0x20000
SECRET_MAGIC = b"a secret"
_MAGIC = int.from_bytes(SECRET_MAGIC, "little")
_DEFINES = (f"-DC_BIT={C_BIT}", f"-DTIMER={_TIMER}", f"-DMAGIC={_MAGIC:#x}")


def firmware() -> Path:
    """
    The image for ``-bios``, assembled if need be.

    :raises build.BuildFailed: no assembler.
    """
    return build.built("es-counter.bin", [_SOURCE, *_DEFINES], _assemble)


def _assemble(image: Path) -> None:
    unlinked = image.with_suffix(".o")
    build.run(["gcc", "-x", "assembler-with-cpp", *_DEFINES, "-c", "-o", unlinked, _SOURCE])
    build.run(["ld", "-Ttext", "0", "--entry", "0", "--oformat", "binary", "-o", image, unlinked])
