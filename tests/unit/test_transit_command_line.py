"""The command line of a transit: the domain's own devices and disks, and nothing that libvirt or clients find twice."""

from __future__ import annotations

import json

import pytest
from sevhop.engine.present_cards import Backend, Cards, backends_in
from sevhop.engine.transit_command_line import Untransitable, derive
from sevhop.guest.command_line import Option, parse, properties

CARDS = Cards(frozenset({"net0", "net1"}))
TAP = ("-netdev", '{"type":"tap","fds":"31:32","id":"hostnet0"}')
CARD = ("-device", '{"driver":"virtio-net-pci","mq":true,"netdev":"hostnet0","id":"net0"}')


class Numbers:
    """Descriptors with recognizable numbers."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    def duplicate(self, number: int) -> int:
        return 100 + number

    def appending(self, path: str) -> int:
        self.paths.append(path)
        return 200 + len(self.paths)


def derived(*argv: str, source: tuple[str, ...] = (), cards: Cards = CARDS) -> list[Option]:
    return parse(derive(argv, source, cards, Numbers()))


def the(options: list[Option], name: str) -> list[dict[str, str]]:
    """The arguments of all options of a name."""
    return [properties(option.value or "") for option in options if option.name == name]


def nodes(*described: dict[str, object]) -> list[dict[str, object]]:
    """What becomes of block nodes."""
    argv = [argument for node in described for argument in ("-blockdev", json.dumps(node))]
    return [json.loads(option.value or "") for option in derived(*argv) if option.name == "blockdev"]


STORAGE: dict[str, object] = {"driver": "file", "filename": "/a", "node-name": "storage", "auto-read-only": True}


@pytest.mark.parametrize("read_only", [True, False])
def test_disk_is_opened_at_once_as_its_format_is(read_only: bool) -> None:
    form = {"driver": "qcow2", "node-name": "format", "read-only": read_only, "file": "storage", "backing": None}
    storage = {key: value for key, value in STORAGE.items() if key != "auto-read-only"}
    assert nodes(STORAGE, form) == [storage | {"read-only": read_only}, form]


def test_backing_file_is_not_opened_for_writing() -> None:
    found = nodes(
        {"driver": "file", "filename": "/b", "node-name": "below", "auto-read-only": True},
        {"driver": "qcow2", "node-name": "base", "read-only": True, "file": "below"},
        STORAGE,
        {"driver": "qcow2", "node-name": "format", "read-only": False, "file": "storage", "backing": "base"},
    )
    assert [node["read-only"] for node in found] == [True, True, False, False]


def test_disk_without_a_format_is_opened_as_it_says() -> None:
    assert nodes(STORAGE | {"read-only": True})[0]["read-only"] is True
    assert nodes(STORAGE)[0]["read-only"] is False


def test_nested_node_is_opened_as_the_outer_one_is() -> None:
    (found,) = nodes({"driver": "raw", "node-name": "format", "read-only": True, "file": dict(STORAGE)})
    assert found["file"] == {"driver": "file", "filename": "/a", "node-name": "storage", "read-only": True}


def test_tap_is_a_duplicate_of_the_sources() -> None:
    options = derived(source=(*TAP, *CARD))
    assert the(options, "netdev") == [{"": "tap", "id": "hostnet0", "fds": "131:132", "vhost": "off"}]
    assert [card["id"] for card in the(options, "device")] == ["net0"]
    one = ("-netdev", "tap,fd=31,id=hostnet0,sndbuf=1600")
    expected = {"": "tap", "id": "hostnet0", "fd": "131", "vhost": "off", "sndbuf": "1600"}
    assert the(derived(source=(*one, *CARD)), "netdev") == [expected]


def test_vhost_net_stays_with_the_source() -> None:
    netdev = ("-netdev", '{"type":"tap","fd":"31","vhost":true,"vhostfd":"33","id":"hostnet0"}')
    expected = {"": "tap", "id": "hostnet0", "fd": "131", "vhost": "off"}
    assert the(derived(source=(*netdev, *CARD)), "netdev") == [expected]


def test_card_that_was_unplugged_is_not_there() -> None:
    assert the(derived(source=(*TAP, *CARD), cards=Cards(frozenset())), "netdev") == []


def test_card_that_was_plugged_has_the_tap_that_qemu_reports() -> None:
    text = (
        "net2: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\r\n"
        " \\ hostnet2: index=0,type=tap,fd=41\r\n"
        "net2: index=1,type=nic\r\n"
        " \\ hostnet2: index=1,type=tap,fd=43\r\n"
    )
    backends = backends_in(text)
    assert backends == {"hostnet2": Backend("tap", 2, (41, 43))}
    card = {"driver": "virtio-net-pci", "id": "net2", "netdev": "hostnet2"}
    options = derived(cards=Cards(frozenset(), [card], backends))
    assert the(options, "netdev") == [{"": "tap", "id": "hostnet2", "fds": "141:143", "vhost": "off"}]


def test_user_network_is_as_it_was() -> None:
    argv = ("-netdev", '{"type":"user","id":"hostnet0","net":"10.0.0.0/24"}')
    assert the(derived(source=(*argv, *CARD)), "netdev") == [{"type": "user", "id": "hostnet0", "net": "10.0.0.0/24"}]


def test_character_devices_lead_nowhere_but_stay_connected() -> None:
    options = derived(
        *("-chardev", "socket,id=charchannel0,path=/run/agent,server=on,wait=off"),
        *("-chardev", "pty,id=charconsole0"),
        *("-chardev", "null,id=a,,b"),
    )
    assert the(options, "chardev") == [
        {"": "file", "id": name, "path": "/dev/null"} for name in ("charchannel0", "charconsole0", "a,b")
    ]


def test_files_are_appended_to() -> None:
    numbers = Numbers()
    argv = (
        *("-chardev", "file,id=charserial0,path=/var/log/one"),
        *("-chardev", "pty,id=charserial1,logfile=/var/log/two"),
        *("-chardev", "file,id=charserial2,path=/dev/null"),
    )
    options = parse(derive(argv, (), CARDS, numbers))
    assert numbers.paths == ["/var/log/one", "/var/log/two"]
    assert [option.value for option in options if option.name == "add-fd"] == ["set=9000,fd=201", "set=9001,fd=202"]
    assert the(options, "chardev") == [
        {"": "file", "id": "charserial0", "path": "/dev/fdset/9000", "append": "on"},
        {"": "file", "id": "charserial1", "path": "/dev/null", "logfile": "/dev/fdset/9001", "logappend": "on"},
        {"": "file", "id": "charserial2", "path": "/dev/null"},
    ]


def test_what_clients_connect_to_is_omitted() -> None:
    options = derived(
        *("-chardev", "socket,id=charmonitor,path=/run/monitor.sock,server=on,wait=off"),
        *("-mon", "chardev=charmonitor,id=monitor,mode=control", "-S", "-vnc", "unix:/run/vnc,audiodev=audio1"),
        *("-audiodev", '{"id":"audio1","driver":"pa","server":"/run/pulse"}', "-display", "dbus"),
        *("-object", '{"qom-type":"input-linux","id":"input1","evdev":"/dev/input/event0"}'),
    )
    assert [option.name for option in options] == ["audiodev", "display"]
    assert the(options, "display") == [{"": "none"}]
    assert the(options, "audiodev") == [{"": "none", "id": "audio1"}]


def test_secrets_are_the_sources() -> None:
    ours = '{"qom-type":"secret","id":"masterKey0","format":"raw","file":"/domain-1/master-key.aes"}'
    theirs = '{"qom-type":"secret","id":"masterKey0","format":"raw","file":"/domain--1/master-key.aes"}'
    (found,) = the(derived("-object", theirs, source=("-object", ours)), "object")
    assert found["file"] == "/domain-1/master-key.aes"
    with pytest.raises(Untransitable, match="the secret masterKey0 was added since the start"):
        derived("-object", theirs)


REFUSED = {
    "tap of its own": ("-netdev", "tap,id=hostnet0,ifname=tap0"),
    "passt": ("-netdev", '{"type":"stream","id":"hostnet0","addr":{"type":"unix","path":"/run/passt"}}'),
    "vhost-user": ("-netdev", '{"type":"vhost-user","chardev":"a","id":"hostnet0"}'),
    "TPM": ("-tpmdev", "emulator,id=tpm-tpm0,chardev=chrtpm"),
    "file system": ("-fsdev", "local,id=fs0,path=/srv"),
    "drive": ("-drive", "file=/a,id=a"),
    "bare image": ("/a",),
    "SPICE": ("-spice", "port=5900"),
    "QXL": ("-device", '{"driver":"qxl-vga","id":"video0"}'),
    "host device": ("-device", '{"driver":"vfio-pci","host":"0000:00:01.0","id":"hostdev0"}'),
    "USB redirection": ("-device", '{"driver":"usb-redir","chardev":"a","id":"redir0"}'),
    "DIMM": ("-device", '{"driver":"pc-dimm","memdev":"memdimm0","id":"dimm0"}'),
    "shared memory": ("-device", '{"driver":"ivshmem-plain","id":"shmem0"}'),
    "filter": ("-object", '{"qom-type":"filter-dump","id":"f0"}'),
    "reservations": ("-object", '{"qom-type":"pr-manager-helper","id":"pr0"}'),
    "entropy": ("-object", '{"qom-type":"rng-egd","id":"r0"}'),
    "clipboard": ("-chardev", "qemu-vdagent,id=a"),
    "descriptor": ("-chardev", "file,id=a,path=/dev/fdset/3"),
    "nbdkit": ("-blockdev", '{"driver":"nbd","server":{"type":"unix","path":"/run/nbdkit.sock"},"node-name":"a"}'),
    "no JSON": ("-blockdev", "driver=file,filename=/a,node-name=a"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_shared_is_refused(what: str) -> None:
    with pytest.raises(Untransitable):
        derived(*REFUSED[what])


@pytest.mark.parametrize("netdev", [("-netdev", "tap,ifname=tap0,id=hostnet0"), ()])
def test_card_of_the_source_that_cannot_be_shared_is_refused(netdev: tuple[str, ...]) -> None:
    with pytest.raises(Untransitable):
        derived(source=(*netdev, *CARD))


def test_plugged_card_with_an_unknown_backend_is_refused() -> None:
    card = {"driver": "virtio-net-pci", "id": "net2", "netdev": "hostnet2"}
    for backends in ({}, {"hostnet2": Backend("tap", 2, (41,))}, {"hostnet2": Backend("l2tpv3")}):
        with pytest.raises(Untransitable):
            derived(cards=Cards(frozenset(), [card], backends))


def test_owners_files_of_an_sev_guest_are_those_of_the_source() -> None:
    """libvirt makes them when it starts the domain; the rest is what the new emulator knows."""

    def sev(directory: str, **more: object) -> tuple[str, str]:
        files = {"dh-cert-file": f"{directory}/dh", "session-file": f"{directory}/session"}
        return "-object", json.dumps({"qom-type": "sev-guest", "id": "lsec0", "cbitpos": 51, **files, **more})

    found, *_ = derived(*sev("/not/there", policy=5), source=sev("/domain-1", policy=5, gone=True))
    assert json.loads(found.value or "") == json.loads(sev("/domain-1", policy=5)[1])
    plain = ("-object", '{"qom-type":"sev-guest","id":"lsec0","cbitpos":51}')
    assert derived(*plain, source=plain)[0].argv() == list(plain)
