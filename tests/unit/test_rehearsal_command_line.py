"""The command line of a rehearsal: the domain's devices, with backends that nobody else uses."""

from __future__ import annotations

import json

import pytest
from sevhop.engine.present_cards import Backend, Cards
from sevhop.engine.rehearsal_command_line import Disk, Network, Unrehearsable, derive
from sevhop.guest.command_line import Option, parse, properties

DISKS = {"virtio-disk0": Disk(1 << 30, False), "pflash0": Disk(1 << 20, True), "pflash1": Disk(1 << 16, False)}


#: Of a source whose network cards are those that it was started with.
CARDS = Cards(frozenset({"net0", "net1"}))


def derived(*argv: str, source: tuple[str, ...] = ()) -> list[Option]:
    return parse(derive(argv, source, DISKS, CARDS).arguments)


def the(options: list[Option], name: str) -> list[dict[str, str]]:
    """The arguments of all options of a name."""
    return [properties(option.value or "") for option in options if option.name == name]


def test_disks_are_nodes_without_content() -> None:
    options = derived(
        *("-machine", "q35,pflash0=libvirt-pflash0-format,pflash1=libvirt-pflash1-format,memory-backend=pc.ram"),
        *("-blockdev", '{"driver":"file","filename":"/a.qcow2","node-name":"libvirt-1-storage"}'),
        *("-blockdev", '{"driver":"qcow2","file":"libvirt-1-storage","node-name":"libvirt-1-format"}'),
        *("-device", '{"driver":"virtio-blk-pci","drive":"libvirt-1-format","id":"virtio-disk0"}'),
        *("-device", '{"driver":"ide-cd","bus":"ide.0","id":"sata0-0-0"}'),
    )
    nodes = {node["node-name"]: node for node in the(options, "blockdev")}
    assert set(nodes) == {"libvirt-pflash0-format", "libvirt-pflash1-format", "libvirt-1-format"}
    assert {node["driver"] for node in nodes.values()} == {"null-co"}
    assert (nodes["libvirt-1-format"]["size"], nodes["libvirt-1-format"]["read-only"]) == (str(1 << 30), "off")
    assert (nodes["libvirt-pflash0-format"]["size"], nodes["libvirt-pflash0-format"]["read-only"]) == (
        str(1 << 20),
        "on",
    )
    assert [device["id"] for device in the(options, "device")] == ["virtio-disk0", "sata0-0-0"]
    names = [option.name for option in options]
    assert max(place for place, name in enumerate(names) if name == "blockdev") < names.index("device")


FLASHES = (
    *("-machine", "q35,pflash0=libvirt-pflash0-format,pflash1=libvirt-pflash1-format,memory-backend=pc.ram"),
    "-blockdev",
    '{"driver":"file","filename":"/code","node-name":"libvirt-pflash0-storage","auto-read-only":true}',
    "-blockdev",
    '{"node-name":"libvirt-pflash0-format","read-only":false,"driver":"raw","file":"libvirt-pflash0-storage"}',
    *("-blockdev", '{"driver":"file","filename":"/vars","node-name":"libvirt-pflash1-storage"}'),
    "-blockdev",
    '{"node-name":"libvirt-pflash1-format","read-only":false,"driver":"raw","file":"libvirt-pflash1-storage"}',
)


def test_firmware_of_an_encrypted_guest_is_its_own() -> None:
    arguments = derive(FLASHES, (), DISKS, CARDS, encrypted=True).arguments
    nodes = [json.loads(option.value or "") for option in parse(arguments) if option.name == "blockdev"]
    file, raw = (
        {"driver": "file", "filename": "/code", "node-name": "libvirt-pflash0-storage", "locking": "off"},
        {"driver": "raw", "file": "libvirt-pflash0-storage", "node-name": "libvirt-pflash0-format"},
    )
    assert nodes[:2] == [file | {"read-only": True}, raw | {"read-only": True}]
    assert [(node["node-name"], node["driver"]) for node in nodes[2:]] == [("libvirt-pflash1-format", "null-co")]


def test_firmware_that_is_not_known_raises() -> None:
    with pytest.raises(Unrehearsable, match="the firmware in libvirt-pflash0-storage is not known"):
        derive((*FLASHES[:2], *FLASHES[4:]), (), DISKS, CARDS, encrypted=True)


def test_external_backends_are_replaced() -> None:
    options = derived(
        *("-chardev", "socket,id=charchannel0,path=/run/agent,server=on,wait=off", "-serial", "stdio"),
        *("-audiodev", '{"id":"audio1","driver":"pa","server":"/run/pulse"}'),
        *("-netdev", "user,id=n0,net=10.0.0.0/24,hostfwd=tcp::2222-:22,hostfwd=tcp::80-:80"),
        *("-netdev", '{"type":"stream","id":"n1","addr":{"type":"unix","path":"/run/passt"}}'),
    )
    assert the(options, "chardev") == [{"": "null", "id": "charchannel0"}]
    assert the(options, "serial") == [{"": "null"}]
    assert the(options, "audiodev") == [{"": "none", "id": "audio1"}]
    user, hub = the(options, "netdev")
    assert user == {"": "user", "id": "n0", "net": "10.0.0.0/24"}
    assert (hub[""], hub["id"]) == ("hubport", "n1")


def test_external_options_are_omitted() -> None:
    options = derived(
        *(
            "-S",
            "-pidfile",
            "/run/pid",
            "-daemonize",
            "-vnc",
            "unix:/run/vnc",
            "-spice",
            "port=5900",
            "-display",
            "gtk",
        ),
        *("-mon", "chardev=charmonitor,id=monitor,mode=control", "-qmp", "unix:/q,server=on", "-add-fd", "set=0,fd=25"),
        *("-object", '{"qom-type":"secret","id":"masterKey0","format":"raw","file":"/key"}'),
        *("-object", "tls-creds-x509,id=t,dir=/pki", "-object", "input-linux,id=k,evdev=/dev/input/event0"),
        *("-object", "iothread,id=iothread1", "-sandbox", "on,spawn=deny"),
    )
    assert [str(option) for option in options] == [
        "-object iothread,id=iothread1",
        "-sandbox on,spawn=deny",
        "-display none",
    ]


def test_launch_files_of_an_sev_guest_are_omitted() -> None:
    [sev] = the(derived("-object", '{"qom-type":"sev-guest","id":"lsec0","policy":1,"session-file":"/s"}'), "object")
    assert sev == {"qom-type": "sev-guest", "id": "lsec0", "policy": "1"}
    [sev] = the(derived("-object", "sev-guest,id=lsec0,dh-cert-file=/c,policy=1"), "object")
    assert sev == {"": "sev-guest", "id": "lsec0", "policy": "1"}


def test_network_cards_come_from_the_source() -> None:
    card = json.dumps({"driver": "virtio-net-pci", "netdev": "hostnet0", "id": "net0", "mq": True})
    source = (
        *("-netdev", '{"type":"tap","fds":"30:31:32:33","vhost":true,"vhostfds":"34:35:36:37","id":"hostnet0"}'),
        *("-device", card),
        *("-netdev", "tap,id=hostnet1,ifname=tap7,queues=2,script=no"),
        *("-device", "e1000e,netdev=hostnet1,id=net1"),
        *("-device", '{"driver":"virtio-rng-pci","id":"rng0"}'),
    )
    rehearsal = derive(["-device", "pcie-root-port,id=pci.1"], source, DISKS, CARDS)
    assert rehearsal.networks == [Network("hostnet0", 4), Network("hostnet1", 2)]
    devices = [option.value for option in parse(rehearsal.arguments) if option.name == "device"]
    assert devices == ["pcie-root-port,id=pci.1", card, "e1000e,netdev=hostnet1,id=net1"]


@pytest.mark.parametrize(
    "argv",
    [
        ["-device", '{"driver":"vhost-vsock-pci","guest-cid":3,"vhostfd":"-1"}'],
        ["-device", "vfio-pci,host=01:00.0"],
        ["-device", '{"driver":"qxl-vga","id":"video0"}'],
        ["-device", "virtio-blk-pci,drive=unknown,id=other"],
        ["-drive", "file=/a.img,if=sd"],
        ["-tpmdev", "emulator,id=t,chardev=c"],
        ["-nic", "user"],
    ],
)
def test_device_that_cannot_be_shared_is_refused(argv: list[str]) -> None:
    with pytest.raises(Unrehearsable):
        derive(argv, [], DISKS, CARDS)


def test_cards_are_those_that_the_guest_has_now() -> None:
    source = ["-netdev", "user,id=hostnet0", "-device", "virtio-net-pci,netdev=hostnet0,id=net0"]
    plugged = [
        {"driver": "virtio-net-pci", "id": "net2", "bus": "pci.2", "netdev": "hostnet2"},
        {"driver": "usb-net", "id": "net3", "bus": "usb.0", "netdev": "hostnet3"},
        {"driver": "e1000", "id": "net4", "bus": "pci.3", "netdev": "hostnet4"},
    ]
    backends = {"hostnet2": Backend("tap", 2), "hostnet3": Backend("user"), "hostnet4": Backend("stream")}
    rehearsal = derive([], source, DISKS, Cards(frozenset({"net1"}), plugged, backends))
    options = parse(rehearsal.arguments)
    assert [device["id"] for device in the(options, "device")] == ["net2", "net3", "net4"]
    assert rehearsal.networks == [Network("hostnet2", 2)]
    user, hub = the(options, "netdev")
    assert user == {"": "user", "id": "hostnet3"}
    assert (hub[""], hub["id"]) == ("hubport", "hostnet4")


def test_card_with_unknown_backend_is_refused() -> None:
    plugged = [{"driver": "virtio-net-pci", "id": "net2", "netdev": "hostnet2"}]
    with pytest.raises(Unrehearsable, match="net2 was plugged"):
        derive([], [], DISKS, Cards(frozenset(), plugged))
