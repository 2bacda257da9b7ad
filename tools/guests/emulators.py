"""
The QEMU versions that guests hop between.

A version is the machine's own QEMU if that is the one, and otherwise that of another Debian suite, fetched and
unpacked by ``tools/fetch-qemu``.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from pathlib import Path

from .build import ROOT

#: Version (major.minor) -> the Debian suite that has it.
SUITES = {"7.2": "bookworm", "10.0": "trixie"}
#: The two that hops are shown and tested with, older one first; machine types of the older exist in both.
OLD, NEW = SUITES
#: Debian's newest, whatever it is today.
UNSTABLE = "sid"


class EmulatorMissing(Exception):
    """A QEMU version is not to be had; the message says why."""


def version(emulator: Path) -> str:
    """
    A QEMU's version as it says itself, such as ``7.2.22``.

    :raises EmulatorMissing: it does not run, or is no QEMU.
    """
    try:
        done = subprocess.run(
            [emulator, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except OSError as err:
        raise EmulatorMissing(f"{emulator}: {err.strerror}") from err
    found = re.match(r"QEMU emulator version (\d+\.\d+\.\d+)", done.stdout)
    if not found:
        raise EmulatorMissing(f"{emulator} is not a QEMU: {(done.stdout + done.stderr).strip()}")
    return found[1]


def installed() -> Path:
    """
    The machine's own QEMU.

    :raises EmulatorMissing: none is installed.
    """
    path = shutil.which("qemu-system-x86_64")
    if path is None:
        raise EmulatorMissing("qemu-system-x86_64 is not installed")
    return Path(path)


def fetched(suite: str) -> Path:
    """
    The QEMU of a Debian suite; the first call downloads it.

    :raises EmulatorMissing: it cannot be downloaded or does not run here.
    """
    done = subprocess.run(
        [ROOT / "tools" / "fetch-qemu", suite], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise EmulatorMissing(done.stderr.strip())
    return Path(done.stdout.strip())


@functools.cache
def emulator(label: str) -> Path:
    """
    The QEMU of a version in :data:`SUITES`, or :data:`UNSTABLE`.

    :raises EmulatorMissing: it is not to be had.
    """
    if label != UNSTABLE:
        try:
            if version(installed()).startswith(f"{label}."):
                return installed()
        except EmulatorMissing:
            pass
    return fetched(SUITES.get(label, label))
