"""
The disks that a guest has now, as options of a command line.

A destination gets the source's command line, which describes the disks that the guest was started with. Where the
present block graph is another one, those options are replaced by others that describe the present nodes:

=================================  =============================================================================
a snapshot, a disk that was moved  ``-blockdev`` of the present nodes, ``drive=`` of the device is the topmost
a medium that was changed          the same; without ``drive=`` if the tray is empty
``-drive id=``                     keeps its name and settings, with the present image
a node that was added or removed   its ``-blockdev`` is added or dropped
a device that was unplugged        its ``-device`` is dropped, and the others keep their PCI addresses
a disk that was plugged            ``-device`` with the properties that it has, also under an id that was used before
=================================  =============================================================================

A node of the command line keeps the options that it has there, since QEMU does not report all of them. Others are
described only if QEMU reports all options that matter. Whether the destination then has the same disks is verified when
it has been started (:mod:`sevhop.disks.block_graph`); what cannot be described is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sevhop_qmp.errors import SevhopError

from ..guest.command_line import Option, parse, properties
from .block_graph import FILE_DRIVERS, GENERATED, BlockGraph, Disk, Node
from .devices import ANONYMOUS, PERIPHERAL, PLUGGABLE, Device

#: Format drivers that need no more than the nodes below them.
_FORMATS = frozenset({"raw", "qcow2", "qed", "vmdk", "vdi", "vpc"})
#: Keys of ``-drive`` that describe its image, and not how the guest sees it.
_IMAGE_KEYS = frozenset({"", "file", "format", "driver", "node-name"})
#: Options of a disk that a snapshot or a copy inherits (block.c: flags of the node that it replaces).
_INHERITED = ("aio", "discard")


class Undescribable(SevhopError):
    """QEMU does not report enough of a disk to describe it."""


@dataclass(frozen=True)
class Plan:
    """
    A command line with the present disks.

    :ivar refused: for each disk that cannot be described, which and why.
    """

    arguments: list[str]
    refused: list[str] = field(default_factory=list)


def adapt(
    arguments: Sequence[str],
    graph: BlockGraph,
    present: Mapping[str, Device],
    added: Sequence[Mapping[str, Any]] = (),
) -> Plan:
    """
    Put the present disks into a command line.

    :param arguments: without the program, with those disks that the guest was started with.
    :param graph: the present disks.
    :param present: the present ones, by QOM path; see :func:`.devices.read`.
    :param added: those that were plugged; see :func:`.devices.plugged`.
    :return: the same arguments when the disks are the same.
    """
    return _Adapter(arguments, graph, present, added).plan()


class _Adapter:
    def __init__(
        self,
        arguments: Sequence[str],
        graph: BlockGraph,
        present: Mapping[str, Device],
        added: Sequence[Mapping[str, Any]],
    ) -> None:
        self._arguments = list(arguments)
        self._options = parse(self._arguments)
        self._paths = self._number_devices()
        self._graph = graph
        self._present = present
        self._added = added
        # -blockdev by the name of its topmost node; that of each option of a node that it has in there.
        self._trees: dict[str, dict[str, Any]] = {}
        self._scalars: dict[str, dict[str, Any]] = {}
        self._intact: set[str] = set()
        self._given: set[str] = set()
        self._described: dict[str, Option] = {}
        self._refused: list[str] = []

    def plan(self) -> Plan:
        for option in self._options:
            if option.name == "blockdev":
                tree = _tree(option.value or "")
                self._trees[str(tree.get("node-name", ""))] = tree
                self._collect(tree)
        for name, tree in self._trees.items():
            if name in self._graph.nodes and self._matches(tree, name):
                self._intact.add(name)
                self._given |= _names(tree)
        others = [
            (option, self._replaced(option, path), path)
            for option, path in zip(self._options, self._paths, strict=True)
            if option.name != "blockdev"
        ]
        for node in self._graph.nodes.values():
            if node.named:
                self._try(self._describe, node.name, node.name)
        plugged_options = [Option("device", json.dumps(self._with_node(device))) for device in self._added]
        same = all(before == now for before, now, _ in others) and self._intact == self._trees.keys()
        if same and not (self._described or plugged_options or self._refused):
            return Plan(self._arguments)
        moves = plugged_options or any(now is None for _, now, _ in others)
        kept = [self._pinned(option, path) if moves else option for _, option, path in others if option is not None]
        options = [*self._blockdevs(), *self._described.values(), *kept, *plugged_options]
        return Plan([argument for option in options for argument in option.argv()], self._refused)

    # -- the command line ----------------------------------------------------------------------------

    def _collect(self, tree: Mapping[str, Any]) -> None:
        if name := tree.get("node-name"):
            self._scalars[str(name)] = {key: value for key, value in tree.items() if not isinstance(value, dict)}
        for value in tree.values():
            if isinstance(value, dict):
                self._collect(value)

    def _matches(self, tree: Mapping[str, Any], name: str) -> bool:
        """Whether a node, and what is below it, is still what an option describes."""
        node = self._graph.nodes[name]
        if tree.get("driver", node.driver) != node.driver or tree.get("node-name", name) != name:
            return False
        if node.driver in FILE_DRIVERS and not _same_path(str(tree.get("filename", "")), node.filename):
            return False
        for role, child in node.children.items():
            option = tree.get(role)
            if isinstance(option, str) and option != child:
                return False
            if isinstance(option, dict) and not self._matches(option, child):
                return False
        return not any(
            isinstance(tree.get(role), (str, dict)) and role not in node.children for role in ("file", "backing")
        )

    def _blockdevs(self) -> list[Option]:
        """Those that stay, in their order; what is described may be built on them, but not the other way round."""
        return [
            option
            for option in self._options
            if option.name == "blockdev" and str(_tree(option.value or "").get("node-name", "")) in self._intact
        ]

    # -- the present nodes ---------------------------------------------------------------------------

    def _try(self, describe: Any, argument: str, node: str) -> Any:
        try:
            return describe(argument)
        except Undescribable as err:
            text = f"{self._graph.disk_of(node)}: {err.message}"
            if text not in self._refused:
                self._refused.append(text)
            return None

    def _describe(self, name: str) -> str:
        """Make sure that a node is among the options. :return: the name that it has there."""
        final = self._final_name(name)
        if name in self._given or final in self._described:
            return final
        tree = self._tree_of(name)
        for role, child in self._graph.nodes[name].children.items():
            tree[role] = self._describe(child)
        self._described[final] = Option("blockdev", json.dumps({"node-name": final, **tree}))
        return final

    def _final_name(self, name: str) -> str:
        """The name of a node in the destination. Each QEMU counts from 0: an earlier hop may have set it."""
        if not name.startswith("#"):
            return name
        final = GENERATED + name[1:]
        while final in self._graph.nodes:
            final += "-"
        return final

    def _nested(self, name: str) -> Any:
        """The same as part of another option, from which it inherits its cache mode and the like."""
        if name in self._given:
            return name
        node = self._graph.nodes[name]
        tree = self._tree_of(name)
        for key in ("cache", "read-only", "detect-zeroes"):
            tree.pop(key, None)
        if node.named:
            tree["node-name"] = name
            self._given.add(name)
        for role, child in node.children.items():
            tree[role] = self._nested(child)
        return tree

    def _tree_of(self, name: str) -> dict[str, Any]:
        """A node's options without those below it."""
        node = self._graph.nodes[name]
        tree: dict[str, Any] = {
            "driver": node.driver,
            "read-only": node.read_only,
            "cache": {"direct": node.direct, "no-flush": node.no_flush},
            "detect-zeroes": node.detect_zeroes,
        }
        given = self._scalars.get(name, {})
        if given.get("driver") == node.driver:
            # It has the options that it was created with, except for what is below it.
            tree |= {key: value for key, value in given.items() if key not in ("node-name", *node.children)}
            if given.get("backing") is None and "backing" in given and "backing" not in node.children:
                tree["backing"] = None
        elif node.driver not in FILE_DRIVERS | _FORMATS:
            raise Undescribable(f"QEMU does not report all options of {node.driver} node {name}, which was added later")
        elif node.driver == "raw" and self._graph.nodes[node.children["file"]].size != node.size:
            raise Undescribable(f"QEMU does not report which part of a file raw node {name} is")
        else:
            tree |= self._inherited(node)
            if node.driver in FILE_DRIVERS:
                tree["filename"] = node.filename
            elif node.driver not in ("raw",) and "backing" not in node.children:
                tree["backing"] = None
        return tree

    def _inherited(self, node: Node) -> dict[str, Any]:
        """Options of the disk's first image, which those that replace it inherit, and QEMU does not report."""
        for disk in self._graph.disks.values():
            if disk.root and any(node.name == other.name for other in self._graph.below(disk.root)):
                for given in self._given_for(disk):
                    found = {key: given[key] for key in _INHERITED if key in given}
                    if node.driver not in FILE_DRIVERS:
                        found.pop("aio", None)
                    if found:
                        return found
        return {}

    def _given_for(self, disk: Disk) -> list[dict[str, Any]]:
        """The options on the command line of the nodes that a disk was started with."""
        for option, path in zip(self._options, self._paths, strict=True):
            if path and (name := option.properties().get("drive")) and self._disk_of(path) == disk:
                return [self._scalars[node] for node in self._names_below(str(name))]
        return []

    def _names_below(self, name: str) -> list[str]:
        tree = self._trees.get(name, {})
        found = [name] if name in self._scalars else []
        for role in ("file", "backing"):
            below = tree.get(role)
            if isinstance(below, str):
                found += self._names_below(below)
            elif isinstance(below, dict) and "node-name" in below:
                found.append(str(below["node-name"]))
        return found

    # -- options -------------------------------------------------------------------------------------

    def _replaced(self, option: Option, path: str) -> Option | None:
        """
        An option as it must be now; None if it must be dropped.

        :param path: of the device that it creates.
        """
        if option.name == "device":
            return self._device(option, path)
        if option.name == "drive" and option.value and properties(option.value).get("id"):
            return self._drive(option)
        return option

    def _device(self, option: Option, path: str) -> Option | None:
        props = option.properties()
        device = self._present.get(path)
        if device is None:
            return None
        if device.plugged and (device.driver in PLUGGABLE or device.driver != props.get("driver", props.get(""))):
            return None  # another device with the same id
        disk = self._disk_of(path)
        drive = props.get("drive")
        if disk is None or disk.device or (drive or "") == disk.root:
            return option
        if drive in {other.properties().get("id") for other in self._options if other.name == "drive"}:
            return option
        if not disk.root:
            return option.without("drive")
        name = self._try(self._describe, disk.root, disk.root)
        return option.without("drive").with_property("drive", name) if name else option

    def _drive(self, option: Option) -> Option | None:
        props = option.properties()
        disk = next((disk for disk in self._graph.disks.values() if disk.device == props["id"]), None)
        if disk is None:
            return None
        if self._drive_matches(props, disk):
            return option
        kept = [
            (key, value)
            for key, value in props.items()
            if key not in _IMAGE_KEYS and not key.startswith(("file.", "backing."))
        ]
        if disk.root:
            nested = self._try(self._nested, disk.root, disk.root)
            if nested is None:
                return option
            if isinstance(nested, str):
                # A node with a name, which others may use as well.
                nested = {"driver": "raw", "file": nested}
            kept.append(("file", f"json:{json.dumps(nested)}"))
        return Option("drive", ",".join(f"{key}={value.replace(',', ',,')}" for key, value in kept))

    def _drive_matches(self, props: Mapping[str, str], disk: Disk) -> bool:
        file = props.get("file", "")
        if not disk.root or not (file or any(key == "driver" or key.startswith("file.") for key in props)):
            # One of the two is empty.
            return not disk.root and not file and not any(key.startswith("file.") for key in props)
        node = self._graph.nodes[disk.root]
        if file.startswith("json:"):
            try:
                tree = json.loads(file[5:])
            except ValueError:
                return True  # QEMU has parsed it; the result is compared later
            return isinstance(tree, dict) and self._matches(tree, disk.root)
        if not file:
            return True  # by single options: compared later
        driver = props.get("format") or props.get("driver")
        return (not driver or driver == node.driver) and (_same_path(file, node.filename) or ":" in file)

    def _with_node(self, device: Mapping[str, Any]) -> dict[str, Any]:
        """A plugged device with the name that its node has in the destination."""
        result = dict(device)
        if "drive" in result:
            for disk in self._graph.disks.values():
                if device["id"] in disk.qdev.split("/") and disk.root:
                    result["drive"] = self._try(self._describe, disk.root, disk.root) or disk.root
        return result

    def _pinned(self, option: Option, path: str) -> Option:
        """A device with its present PCI address, whatever else is on its bus."""
        if not path or "addr" in option.properties():
            return option
        device = self._present.get(path)
        return option.with_property("addr", device.address) if device is not None and device.address else option

    def _number_devices(self) -> list[str]:
        """
        The QOM path of each option that is a ``-device``. Those without an id are numbered as QEMU creates them: first
        those that are not JSON, then those of ``-drive if=virtio``, then JSON.
        """
        paths = [""] * len(self._options)
        for at, option in enumerate(self._options):
            if option.name == "device" and (name := option.properties().get("id")):
                paths[at] = f"{PERIPHERAL}/{name}"
        nameless = [at for at, option in enumerate(self._options) if option.name == "device" and not paths[at]]
        plain = [at for at in nameless if not self._options[at].is_json]
        by_drives = sum(
            option.name == "drive" and option.properties().get("if") == "virtio" for option in self._options
        )
        for number, at in enumerate(plain):
            paths[at] = f"{ANONYMOUS}/device[{number}]"
        for number, at in enumerate((at for at in nameless if at not in plain), len(plain) + by_drives):
            paths[at] = f"{ANONYMOUS}/device[{number}]"
        return paths

    def _disk_of(self, path: str) -> Disk | None:
        for disk in self._graph.disks.values():
            if disk.qdev == path.removeprefix(PERIPHERAL + "/") or f"{disk.qdev}/".startswith(f"{path}/"):
                return disk
        return None


def _tree(value: str) -> dict[str, Any]:
    """The argument of ``-blockdev``, nested."""
    if value.startswith("{"):
        try:
            tree = json.loads(value)
        except ValueError:
            return {}
        return tree if isinstance(tree, dict) else {}
    result: dict[str, Any] = {}
    for key, text in properties(value).items():
        *outer, last = (key or "driver").split(".")
        inner = result
        for part in outer:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                return result
        inner[last] = text
    return result


def _names(tree: Mapping[str, Any]) -> set[str]:
    """The node names in an option."""

    found = {str(tree["node-name"])} if "node-name" in tree else set()
    for value in tree.values():
        if isinstance(value, dict):
            found |= _names(value)
    return found


def _same_path(ours: str, theirs: str) -> bool:
    return os.path.normpath(ours.removeprefix("file:")) == os.path.normpath(theirs)
