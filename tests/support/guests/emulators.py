"""
The QEMU versions that guests hop between.

A version is the machine's own QEMU if that is the one, and otherwise that of another Debian suite, fetched and
unpacked by ``tools/fetch-qemu``.
"""

from __future__ import annotations

import functools
import re
import shutil
from pathlib import Path

from .build import ROOT, BuildFailed, Unavailable, fetch, run

#: Version (major.minor) -> the Debian suite that has it.
SUITES = {"7.2": "bookworm", "10.0": "trixie"}
#: The two that hops are shown and tested with, older one first; machine types of the older exist in both.
OLD, NEW = SUITES
#: Debian's newest, whatever it is today.
UNSTABLE = "sid"


def version(emulator: Path) -> str:
    """
    A QEMU's version as it reports it, such as ``7.2.22``.

    :raises BuildFailed: it does not run, or is no QEMU.
    """
    said = run([emulator, "--version"])
    found = re.match(r"QEMU emulator version (\d+\.\d+\.\d+)", said)
    if not found:
        raise BuildFailed(f"{emulator} is not a QEMU: {said.strip()}")
    return found[1]


def installed() -> Path:
    """
    The machine's own QEMU.

    :raises Unavailable: none is installed.
    """
    path = shutil.which("qemu-system-x86_64")
    if path is None:
        raise Unavailable("qemu-system-x86_64 is not installed")
    return Path(path)


def fetched(suite: str) -> Path:
    """
    The QEMU of a Debian suite; the first call downloads it.

    :raises Unavailable: it cannot be downloaded.
    :raises BuildFailed: it does not run here.
    """
    return Path(fetch([ROOT / "tools" / "fetch-qemu", suite]))


@functools.cache
def emulator(label: str) -> Path:
    """
    The QEMU of a version in :data:`SUITES`, or :data:`UNSTABLE`.

    :raises Unavailable: it is not to be had.
    """
    if label != UNSTABLE:
        try:
            if version(installed()).startswith(f"{label}."):
                return installed()
        except Unavailable:
            pass
    return fetched(SUITES.get(label, label))


def uefi(label: str) -> tuple[Path, Path]:
    """
    OVMF of the Debian release that has a version of QEMU: its code, and the variables that a machine starts with.

    :raises Unavailable: it is not to be had.
    """
    share = emulator(label).parents[1] / "share/OVMF"
    code, variables = share / "OVMF_CODE_4M.fd", share / "OVMF_VARS_4M.fd"
    if not code.exists():
        raise Unavailable(f"OVMF is not installed: {code}")
    return code, variables
