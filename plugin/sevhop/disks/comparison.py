"""
Block graphs compared: those of source and destination (:func:`differences`), or of one QEMU before and now
(:func:`changes`).
"""

from __future__ import annotations

import json
import os
from dataclasses import replace

from .block_graph import FILE_DRIVERS, GENERATED, BlockGraph, Node


def differences(source: BlockGraph, destination: BlockGraph, *, names: bool) -> list[str]:
    """
    How the destination's disks differ from the source's; empty when a hop may continue. Each has the disk's name in it.

    :param names: whether nodes whose names were set explicitly must have the same names.
    """
    found = []
    for key, disk in source.disks.items():
        theirs = destination.disks.get(key)
        if theirs is None:
            found.append(f"disk {disk.name} is missing in the new QEMU")
        elif bool(disk.root) != bool(theirs.root):
            found.append(f"disk {disk.name} has {'no' if disk.root else 'a'} medium in the new QEMU")
        elif disk.root:
            ours, other = source.nodes[disk.root], destination.nodes[theirs.root]
            reason = _tree(source, _solid(source, disk.root), destination, _solid(destination, theirs.root))
            if not reason and (ours.read_only, ours.direct) != (other.read_only, other.direct):
                reason = f"{ours.filename} is opened in another mode in the new QEMU"
            if reason:
                found.append(f"disk {disk.name}: {reason}")
    for key, disk in destination.disks.items():
        if key not in source.disks:
            found.append(f"disk {disk.name} of the new QEMU is not in the old QEMU")
    if names and not found:
        mine, other_names = _named(source), _named(destination)
        found += [f"block node {name} is missing in the new QEMU" for name in sorted(mine - other_names)]
        found += [f"block node {name} of the new QEMU is not in the old QEMU" for name in sorted(other_names - mine)]
    return found


def _named(graph: BlockGraph) -> set[str]:
    return {name for name, node in graph.nodes.items() if node.named and not name.startswith(GENERATED)}


def _solid(graph: BlockGraph, name: str) -> Node:
    """A node, or what is below it if it is a ``raw`` of the same size; newer versions of libvirt omit that."""
    node = graph.nodes[name]
    while node.driver == "raw" and set(node.children) == {"file"}:
        below = graph.nodes[node.children["file"]]
        if below.size != node.size:
            break
        node = below
    return node


def _tree(source: BlockGraph, ours: Node, destination: BlockGraph, theirs: Node) -> str:
    """How two trees differ, in the first node that does; empty if they do not."""
    if ours.driver != theirs.driver:
        return f"{theirs.filename or theirs.driver} in the new QEMU, {ours.filename or ours.driver} in the old QEMU"
    if (not ours.children or ours.driver == "raw") and not _same_name(ours.filename, theirs.filename):
        return f"{theirs.filename} in the new QEMU, {ours.filename} in the old QEMU"
    if ours.children.keys() != theirs.children.keys():
        below, expected = (", ".join(node.children) or "nothing" for node in (theirs, ours))
        return f"{ours.filename} has {below} below it in the new QEMU, {expected} in the old QEMU"
    # A file grows below its format, and the destination sees that when it activates the images.
    if ours.driver not in FILE_DRIVERS and ours.size != theirs.size:
        return f"{ours.filename} has {theirs.size} bytes in the new QEMU, {ours.size} in the old QEMU"
    for role, child in ours.children.items():
        reason = _tree(source, _solid(source, child), destination, _solid(destination, theirs.children[role]))
        if reason:
            return reason
    return ""


def _same_name(ours: str, theirs: str) -> bool:
    """Whether two filenames mean the same; what paths lead to is compared by :class:`.images.Images`."""
    if ours.startswith("json:") and theirs.startswith("json:"):
        try:
            return bool(json.loads(ours[5:]) == json.loads(theirs[5:]))
        except ValueError:
            return False
    return os.path.normpath(ours) == os.path.normpath(theirs)


def changes(before: BlockGraph, now: BlockGraph) -> str:
    """The first disk, node or export that is not as it was in the same QEMU; empty when there is none."""
    for key in before.disks.keys() | now.disks.keys():
        if before.disks.get(key) != now.disks.get(key):
            return f"disk {(before.disks.get(key) or now.disks[key]).name}"
    for name in before.nodes.keys() | now.nodes.keys():
        ours, theirs = before.nodes.get(name), now.nodes.get(name)
        if ours is None or theirs is None or _lasting(ours) != _lasting(theirs):
            return (before if ours is not None else now).disk_of(name)
    if before.exports != now.exports:
        return "an export of a disk"
    return ""


def _lasting(node: Node) -> Node:
    """A node without what changes when the guest writes."""
    return replace(node, size=0 if node.driver in FILE_DRIVERS else node.size, allocated=None)
