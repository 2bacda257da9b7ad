"""
The images of a guest that is suspended in the keeper: no QEMU has them open, so nothing locks them, and nobody may
change them until the guest is restored. It would write what it remembers over what is new.

What is recorded of each is what a change cannot leave as it is: which file it is, its size, and when it was last
written. Of a block device that is its number; of an image on a server nothing is known here.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from .block_graph import FILE_DRIVERS, BlockGraph

#: Of a file; of a block device only the first one.
_WORDS = ("it is another file", "its size has changed", "it was written to")


def paths(graph: BlockGraph, xml: str) -> list[str]:
    """
    Of the images that devices of a guest use, with their backing images.

    :param xml: of its domain: what is ``<shareable/>`` there, other guests may write to.
    """
    disks = ElementTree.fromstring(xml).iterfind("devices/disk")
    sources = [disk.find("source") for disk in disks if disk.find("shareable") is not None]
    shared = {source.get(name) for source in sources if source is not None for name in ("file", "dev")}
    nodes = [graph.nodes[name] for name in graph.used()]
    found = {node.filename for node in nodes if node.driver in FILE_DRIVERS and node.filename.startswith("/")}
    return sorted(found - shared)


def recorded(images: Iterable[str | Path]) -> dict[str, Any]:
    """What is recorded of images, by their paths. One that cannot be found is left out."""
    found = {str(path): _identity(path) for path in images}
    return {path: identity for path, identity in found.items() if identity is not None}


def changed(before: Mapping[str, Any], *, opened: bool = False) -> str:
    """
    Whether somebody has changed an image.

    :param before: from :func:`recorded`, also by way of JSON.
    :param opened: a QEMU of the hop has had the images since, and may have written to them.
    :return: which one, and how; empty if none was changed.
    """
    for path, was in before.items():
        now = _identity(path)
        if now is None:
            return f"{path} is not there any more"
        words = _WORDS[:1] if opened else _WORDS
        different = [text for text, one, other in zip(words, was, now, strict=False) if one != other]
        if different:
            return f"{path}: {', and '.join(different)}"
    return ""


def _identity(path: str | Path) -> list[Any] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    if stat.S_ISBLK(found.st_mode):
        return [f"block {found.st_rdev}"]
    return [f"file {found.st_dev}:{found.st_ino}", found.st_size, found.st_mtime_ns]
