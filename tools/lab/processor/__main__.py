"""Changes a QEMU source tree: python3 -m lab.processor TREE."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from .hooks import HookError, apply
from .places import DEVICES, DIRECTORY, HOOKS, QEMU

SOURCES = Path(__file__).with_name("qemu")


def change(tree: Path) -> None:
    """Add our files to a source tree and have QEMU's call them.

    :raise HookError: it is another version, or a place is not found.
    """
    version = (tree / "VERSION").read_text().strip()
    if version.rpartition(".")[0] != QEMU:
        raise HookError(f"the source is QEMU {version}, and the hooks are for {QEMU}")
    apply(tree, HOOKS)
    (tree / DIRECTORY).mkdir()
    for source in SOURCES.iterdir():
        target = tree / DEVICES if source.suffix == ".mak" else tree / DIRECTORY / source.name
        shutil.copyfile(source, target)


if __name__ == "__main__":
    try:
        change(Path(sys.argv[1]))
    except HookError as error:
        sys.exit(f"processor: cannot change QEMU's source: {error}")
