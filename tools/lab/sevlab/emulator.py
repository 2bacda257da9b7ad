"""The lab's emulator: Debian's QEMU with the processor of tools/lab/processor, built at the first use."""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path

from tests.support.guests import build

from . import builder
from .kernels import CACHE, locked

PROCESSOR = build.ROOT / "tools" / "lab" / "processor"
_KEPT = 3  # builds of other trees, or of this one before a change


def obtain() -> Path:
    """The emulator's executable from the cache, built first if it is not there.

    :raise LabError: it cannot be built.
    """
    with locked("processor"):
        builds = CACHE / "processor"
        wanted = builds / _digest()
        if not wanted.exists():
            builds.mkdir(exist_ok=True)
            _build(wanted)
        wanted.touch()
        _clean(builds)
        return wanted / "qemu-system-x86_64"


def _clean(builds: Path) -> None:
    """Remove old builds, and what one that was killed has left."""
    complete = [one for one in builds.iterdir() if (one / "source").is_file()]
    kept = sorted(complete, key=lambda one: one.stat().st_mtime)[-_KEPT:]
    for one in set(builds.iterdir()) - set(kept):
        shutil.rmtree(one)


def _digest() -> str:
    """Of everything that the build is made of, but for Debian's source, of which the hooks know the version."""
    digest = hashlib.sha256()
    for file in sorted(
        path for path in PROCESSOR.rglob("*") if path.suffix in (".py", ".c", ".h", ".build", ".mak", "")
    ):
        if file.is_file():
            digest.update(str(file.relative_to(PROCESSOR)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _build(directory: Path) -> None:
    print("lab: building its emulator, once; this takes some minutes", file=sys.stderr, flush=True)
    builder.run([PROCESSOR / "build", directory], "the lab's emulator cannot be built")
