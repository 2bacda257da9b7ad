"""The present disks as options of a command line; with real QEMUs they are in tests/qemu/test_disks.py."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from sevhop.disks.block_graph import BlockGraph, Disk, Node, read
from sevhop.disks.comparison import changes, differences
from sevhop.disks.devices import Device
from sevhop.disks.present_disks import Plan, adapt
from sevhop.guest.command_line import parse, properties
from sevhop_qmp.errors import CommandError

ANONYMOUS = "/machine/peripheral-anon/device[0]"


def node(name: str, driver: str, filename: str, **more: Any) -> Node:
    fields: dict[str, Any] = {
        "read_only": False,
        "direct": False,
        "no_flush": False,
        "detect_zeroes": "off",
        "size": 1 << 20,
        "allocated": 4096,
        "active": None,
        "bitmaps": (),
    }
    return Node(name, driver, filename, **(fields | more))


def qcow2(name: str, path: str, below: str = "", **more: Any) -> list[Node]:
    """An image, and its file."""
    children = {"file": f"{name}-file"} | ({"backing": below} if below else {})
    return [node(f"{name}-file", "file", path, **more), node(name, "qcow2", path, children=children, **more)]


def graph(nodes: list[Node], *disks: Disk) -> BlockGraph:
    return BlockGraph({disk.key: disk for disk in disks}, {one.name: one for one in nodes}, ())


COMMAND = [
    *("-blockdev", "driver=file,node-name=disk-file,filename=/disk,discard=unmap,aio=native"),
    *("-blockdev", "driver=qcow2,node-name=disk,file=disk-file"),
    *("-device", "virtio-blk-pci,drive=disk"),
    *("-device", "virtio-rng-pci,id=entropy"),
]
DEVICES = {
    ANONYMOUS: Device(ANONYMOUS, "virtio-blk-pci", "0x2.0"),
    "/machine/peripheral/entropy": Device("/machine/peripheral/entropy", "virtio-rng-pci", "0x3.0"),
}


def blockdevs(plan: Plan) -> dict[str, dict[str, Any]]:
    """Described nodes by name; those that are left of the command line as well, flat."""
    found = {}
    for option in parse(plan.arguments):
        if option.name == "blockdev":
            value = option.value or ""
            tree = json.loads(value) if value.startswith("{") else properties(value)
            found[tree["node-name"]] = tree
    return found


def devices(plan: Plan) -> list[dict[str, str]]:
    return [properties(option.value or "") for option in parse(plan.arguments) if option.name == "device"]


def test_arguments_are_unchanged_if_the_disks_are_the_same() -> None:
    present = graph(qcow2("disk", "/disk"), Disk("", f"{ANONYMOUS}/virtio-backend", "disk"))
    assert adapt(COMMAND, present, DEVICES) == Plan(COMMAND)


def test_snapshot_is_described_on_top_of_its_backing_file() -> None:
    nodes = [*qcow2("disk", "/disk"), *qcow2("overlay", "/overlay", "disk")]
    plan = adapt(COMMAND, graph(nodes, Disk("", ANONYMOUS, "overlay")), DEVICES)
    assert plan.refused == []
    assert list(blockdevs(plan)) == ["disk-file", "disk", "overlay-file", "overlay"]
    assert blockdevs(plan)["overlay"]["backing"] == "disk"
    assert devices(plan)[0]["drive"] == "overlay"
    below = blockdevs(plan)["overlay-file"]
    assert (below["filename"], below["discard"], below["aio"]) == ("/overlay", "unmap", "native")


def test_node_with_a_generated_name_gets_a_name() -> None:
    """QEMU accepts no name in the form of a generated one."""
    copy = [node("#block1", "raw", "/x", children={"file": "#block2"}), node("#block2", "file", "/x")]
    nodes = [*qcow2("disk", "/disk"), *copy]
    plan = adapt(COMMAND, graph(nodes, Disk("", ANONYMOUS, "#block1")), DEVICES)
    assert devices(plan)[0]["drive"] == "hop-block1"
    assert blockdevs(plan)["hop-block1"]["file"] == "hop-block2"


def test_generated_name_is_not_the_one_that_an_earlier_hop_has_set() -> None:
    """A medium was changed before the first hop, and after it; QEMU's generated names begin from 0 in each process."""
    before = [
        node("hop-block1", "raw", "/x", children={"file": "hop-block2"}),
        node("hop-block2", "file", "/x"),
        node("hop-block1-", "file", "/z"),
    ]
    after = [node("#block1", "raw", "/y", children={"file": "#block2"}), node("#block2", "file", "/y")]
    plan = adapt(COMMAND, graph([*before, *after], Disk("", ANONYMOUS, "#block1")), DEVICES)
    described = blockdevs(plan)
    assert devices(plan)[0]["drive"] == "hop-block1--"
    assert described["hop-block1--"]["file"] == "hop-block2-"
    assert (described["hop-block2-"]["filename"], described["hop-block2"]["filename"]) == ("/y", "/x")


def test_node_that_was_removed_is_dropped() -> None:
    plan = adapt(COMMAND, graph(qcow2("other", "/other"), Disk("", ANONYMOUS, "other")), DEVICES)
    assert list(blockdevs(plan)) == ["other-file", "other"]


def test_other_devices_keep_their_addresses_when_one_was_unplugged() -> None:
    present = {path: device for path, device in DEVICES.items() if path != "/machine/peripheral/entropy"}
    plan = adapt(COMMAND, graph(qcow2("disk", "/disk"), Disk("", ANONYMOUS, "disk")), present)
    assert devices(plan) == [{"": "virtio-blk-pci", "drive": "disk", "addr": "0x2.0"}]


def test_plugged_disk_is_added() -> None:
    nodes = [*qcow2("disk", "/disk"), *qcow2("more", "/more")]
    disks = Disk("", ANONYMOUS, "disk"), Disk("", "/machine/peripheral/two/virtio-backend", "more")
    added = {"driver": "virtio-blk-pci", "id": "two", "drive": "more", "addr": "0x4.0", "bus": "pci.0"}
    plan = adapt(COMMAND, graph(nodes, *disks), DEVICES, [added])
    assert devices(plan)[-1] == {key: str(value) for key, value in added.items()}


def test_node_whose_options_qemu_does_not_report_is_refused() -> None:
    nodes = [node("disk", "nbd", "nbd://elsewhere")]
    plan = adapt(COMMAND, graph(nodes, Disk("", ANONYMOUS, "disk")), DEVICES)
    assert plan.refused == [
        "disk disk: QEMU does not report all options of nbd node disk, which was added later",
    ]


def test_drive_keeps_its_settings() -> None:
    command = ["-drive", "if=none,id=d0,file=/a,,b,format=raw,cache=none,werror=stop", "-device", "ide-hd,drive=d0"]
    path = "/machine/peripheral-anon/device[0]"
    nodes = [
        *qcow2("#top", "/x,y", "#base"),
        node("#base", "raw", "/a,b", children={"file": "#base-file"}),
        node("#base-file", "file", "/a,b"),
    ]
    plan = adapt(command, graph(nodes, Disk("d0", path, "#top")), {path: Device(path, "ide-hd", "")})
    drive = properties(plan.arguments[1])
    image = json.loads(drive.pop("file").removeprefix("json:"))
    assert drive == {"if": "none", "id": "d0", "cache": "none", "werror": "stop"}
    assert image["file"]["filename"] == "/x,y"
    assert image["backing"] == {"driver": "raw", "file": {"driver": "file", "filename": "/a,b"}}


# -- comparing ---------------------------------------------------------------------------------------


def one(*nodes: Node, root: str = "disk") -> BlockGraph:
    return graph(list(nodes), Disk("", "disk0", root))


def test_same_disks_do_not_differ() -> None:
    assert differences(one(*qcow2("disk", "/disk")), one(*qcow2("disk", "/disk")), names=True) == []


def test_different_disk_is_reported_by_name() -> None:
    ours = one(*qcow2("disk", "/disk"), *qcow2("overlay", "/overlay", "disk"), root="overlay")
    for theirs in (
        one(*qcow2("disk", "/disk")),
        one(*qcow2("disk", "/other")),
        one(*qcow2("disk", "/disk"), *qcow2("overlay", "/elsewhere", "disk"), root="overlay"),
        one(node("disk", "raw", "/disk", children={"file": "f"}), node("f", "file", "/disk", size=5)),
        one(*qcow2("disk", "/disk"), root=""),
        graph(qcow2("disk", "/disk")),
    ):
        (found,) = differences(ours, theirs, names=False)
        assert "disk disk0" in found


def test_disk_of_another_size_or_mode_differs() -> None:
    ours = one(*qcow2("disk", "/disk"))
    for more in ({"size": 1 << 21}, {"read_only": True}, {"direct": True}):
        assert differences(ours, one(*qcow2("disk", "/disk", **more)), names=False)


def test_raw_node_of_the_same_size_may_be_omitted() -> None:
    ours = one(node("disk", "raw", "/disk", children={"file": "f"}), node("f", "file", "/disk"))
    assert differences(ours, one(node("disk", "file", "/disk")), names=False) == []


def test_node_names_are_compared_outside_libvirt() -> None:
    ours, theirs = one(*qcow2("disk", "/disk")), one(*qcow2("libvirt-1", "/disk"), root="libvirt-1")
    assert differences(ours, theirs, names=False) == []
    assert differences(ours, theirs, names=True)


def test_writes_of_the_guest_are_no_change() -> None:
    before = one(*qcow2("disk", "/disk"))
    grown = one(*qcow2("disk", "/disk", allocated=1 << 20))
    assert changes(before, grown) == ""
    assert changes(before, one(*qcow2("disk", "/disk", read_only=True))) == "disk disk0"
    assert changes(before, BlockGraph(before.disks, before.nodes, ("nbd",))) == "an export of a disk"


def test_disks_survive_json() -> None:
    ours = one(*qcow2("disk", "/disk"))
    assert BlockGraph.from_fields(json.loads(json.dumps(asdict(ours)))) == ours


class BusyOnce:
    """A QEMU whose query-block fails the first time."""

    name = "monitor"

    def __init__(self) -> None:
        self.executed: list[str] = []

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float | None = None
    ) -> Any:
        self.executed.append(command)
        if self.executed.count("query-block") == 1 and command == "query-block":
            raise CommandError(command, "Failed to read bitmap directory: Bad file descriptor")
        return []


def test_disks_are_read_again_when_a_query_fails() -> None:
    busy = BusyOnce()
    assert asyncio.run(read(busy)).nodes == {}  # type: ignore[arg-type]
    assert busy.executed.count("query-block") == 2
