"""
The images of a guest that is suspended in the keeper: no QEMU has them open, so nothing locks them, and nobody may
change them until the guest is restored. It would write what it remembers over what is new.

What is recorded of each is what a change cannot leave as it is: which file it is, its size, and when it was last
written. Of a block device the kernel does not record that, and of an image on a server nothing is known here.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from .block_graph import FILE_DRIVERS, BlockGraph

#: What has changed, in the order of :func:`_identity`.
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
    """What is recorded of images, by their paths. What is no file, or cannot be found, is left out."""
    found = {}
    for path in images:
        with contextlib.suppress(OSError):
            if stat.S_ISREG((status := os.stat(path)).st_mode):
                found[str(path)] = _identity(status)
    return found


def changed(before: Mapping[str, Any], *, opened: bool = False) -> str:
    """
    Whether somebody has changed an image.

    :param before: from :func:`recorded`, also by way of JSON.
    :param opened: a QEMU of the hop has had the images since, and may have written to them.
    :return: which one, and how; empty if none was changed.
    """
    words = _WORDS[:1] if opened else _WORDS
    for path, was in before.items():
        try:
            now = _identity(os.stat(path))
        except OSError as err:
            return f"{path}: {err.strerror}"
        if different := [text for text, one, other in zip(words, was, now, strict=False) if one != other]:
            return f"{path}: {', and '.join(different)}"
    return ""


def _identity(status: os.stat_result) -> list[Any]:
    """One value for each of :data:`_WORDS`."""
    return [f"{status.st_dev}:{status.st_ino}", status.st_size, status.st_mtime_ns]
