"""What libvirt needs to start a domain again, as far as it can be tested without one."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
from sevhop.checks import domain_files, restart
from sevhop.checks.domain_files import File
from sevhop.checks.result import Status
from sevhop.disks.block_graph import BlockGraph, Disk, Node
from sevhop_qmp.credentials import Credentials
from sevhop_qmp.ram_blocks import RamBlock

from .inspected_guest import guest

OURSELVES = Credentials(os.geteuid(), os.getegid(), (), 0o22)
NOBODY = Credentials(65534, 65534, (), 0o22)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can test what another user may do")


def node(name: str, filename: str, *, read_only: bool = False, driver: str = "file", **children: str) -> Node:
    return Node(name, driver, filename, read_only, False, False, "off", 1 << 20, None, True, (), children)


def graph(*nodes: Node, qdev: str = "/machine/peripheral/vda/virtio-backend") -> BlockGraph:
    return BlockGraph({qdev: Disk("", qdev, nodes[0].name)}, {one.name: one for one in nodes}, ())


def domain(inside: str) -> ElementTree.Element:
    return ElementTree.fromstring(f"<domain>{inside}</domain>")


DISK = graph(
    node("format", "/a", driver="qcow2", file="file", backing="below"),
    node("file", "/a"),
    node("below", "/b", driver="raw", file="below-file"),
    node("below-file", "/b"),
)


def test_files_of_a_disk_are_those_of_its_chain() -> None:
    found = domain_files.of(domain("<devices/>"), DISK, dynamic=True)
    assert found == [File("disk vda", "/a", "rw", True), File("disk vda", "/b", "r", True)]


def test_file_below_a_node_that_is_only_read_is_only_read() -> None:
    medium = graph(node("format", "/a", read_only=True, driver="raw", file="file"), node("file", "/a"))
    assert [file.access for file in domain_files.of(domain("<devices/>"), medium, dynamic=True)] == ["r"]


@pytest.mark.parametrize(
    ("xml", "dynamic", "given"),
    [
        ("<devices/>", True, True),
        ("<devices/>", False, False),
        ("<seclabel type='none' model='dac'/>", True, False),
        ("<seclabel type='dynamic' model='dac' relabel='no'/>", True, False),
        ("<seclabel type='none' model='selinux'/>", True, True),
        ("<devices><disk><source file='/a'><seclabel relabel='no'/></source></disk></devices>", True, False),
        ("<devices><disk><source file='/c'><seclabel relabel='no'/></source></disk></devices>", True, True),
    ],
)
def test_files_are_given_to_qemus_user_unless_the_domain_says_no(xml: str, dynamic: bool, given: bool) -> None:
    assert domain_files.of(domain(xml), DISK, dynamic=dynamic)[0].given is given


def test_firmware_is_never_given_to_qemus_user() -> None:
    boot = "<os><loader>/code</loader><kernel>/vmlinuz</kernel></os>"
    found = domain_files.of(domain(boot), DISK, dynamic=True)[2:]
    assert found == [File("firmware", "/code", "r", False), File("kernel", "/vmlinuz", "r", True)]
    flash = graph(node("code", "/code", read_only=True), qdev="/machine/system.flash0")
    assert domain_files.of(domain(boot), flash, dynamic=True)[0] == found[0]
    variables = graph(node("variables", "/variables"), qdev="/machine/system.flash1")
    assert domain_files.of(domain(boot), variables, dynamic=True)[0] == File("firmware", "/variables", "rw", True)


@pytest.mark.parametrize(
    ("text", "dynamic"), [("", True), ("#dynamic_ownership = 0", True), (" dynamic_ownership=0 ", False)]
)
def test_ownership_is_dynamic_unless_configured(tmp_path: Path, text: str, dynamic: bool) -> None:
    path = tmp_path / "qemu.conf"
    path.write_text(text)
    assert domain_files.ownership_is_dynamic(path) is dynamic
    assert domain_files.ownership_is_dynamic(tmp_path / "none")


def test_missing_file_is_an_obstacle(tmp_path: Path) -> None:
    found = domain_files.obstacle(File("firmware", f"{tmp_path}/none", "r", False), OURSELVES)
    assert found == f"firmware: {tmp_path}/none: No such file or directory"


@needs_root
@pytest.mark.parametrize(
    ("mode", "directory", "access", "given", "reason"),
    [
        (0o644, 0o755, "r", False, ""),
        (0o600, 0o755, "r", True, ""),
        (0o600, 0o755, "r", False, "cannot read"),
        (0o644, 0o755, "rw", False, "cannot write"),
        (0o644, 0o700, "r", True, "cannot reach"),
    ],
)
def test_file_is_tested_as_qemus_user(
    tmp_path: Path, mode: int, directory: int, access: str, given: bool, reason: str
) -> None:
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    (tmp_path / "d").mkdir(directory)
    path = tmp_path / "d" / "file"
    path.touch()
    path.chmod(mode)
    found = domain_files.obstacle(File("kernel", str(path), access, given), NOBODY)
    assert found == (f"kernel: the user of QEMU (65534) {reason} {path}" if reason else "")


def test_file_that_root_may_not_see_is_tested_as_qemus_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On NFS, where root is nobody."""
    path = tmp_path / "file"
    path.touch()

    def stat(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    with monkeypatch.context() as patch:
        patch.setattr("sevhop.checks.domain_files.os.stat", stat)
        assert domain_files.obstacle(File("disk", str(path), "r", False), OURSELVES) == ""
        found = domain_files.obstacle(File("disk", f"{path}.none", "r", False), OURSELVES)
    assert found == f"disk: the user of QEMU ({os.geteuid()}) cannot read {path}.none"


def test_log_without_a_directory_is_found(tmp_path: Path) -> None:
    there, gone = f"{tmp_path}/log", f"{tmp_path}/gone/log"
    for path, found in ((there, []), (gone, [f"serial: the directory of {gone} does not exist"])):
        for device in (
            f"<serial type='file'><source path='{path}'/></serial>",
            f"<serial type='pty'><source path='/none/pts'/><log file='{path}'/></serial>",
            f"<serial type='unix'><source mode='bind' path='{path}'/></serial>",
        ):
            assert domain_files.without_directory(domain(f"<devices>{device}</devices>")) == found


@pytest.fixture
def server(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path}/server")
        yield listener


def test_server_that_listens_is_found_without_connecting(server: socket.socket) -> None:
    path = server.getsockname()
    assert not domain_files.listens(path)
    assert not domain_files.listens(f"{path}.none")
    server.listen()
    server.setblocking(False)
    assert domain_files.listens(path)
    with pytest.raises(BlockingIOError):
        server.accept()


def test_server_in_another_network_namespace_is_found(server: socket.socket, tmp_path: Path) -> None:
    server.listen()
    listed = tmp_path / "unix"
    listed.write_text("Num RefCount Protocol Flags Type St Inode Path\n")
    assert domain_files.listens(server.getsockname(), listed)


def test_server_on_a_port_of_this_host_is_found() -> None:
    channel = "<channel type='tcp'><source mode='connect' host='{}' service='{}'/></channel>"
    disk = "<disk type='network'><source protocol='nbd'><host name='{}' port='{}'/></source></disk>"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        for device in (channel, disk):
            for host in ("127.0.0.1", "localhost"):
                found = domain_files.without_server(domain(f"<devices>{device.format(host, port)}</devices>"))
                assert [text.partition(": ")[2] for text in found] == [f"no process listens on {host} port {port}"]
            assert not domain_files.without_server(domain(f"<devices>{device.format('192.0.2.1', port)}</devices>"))
        listener.listen()
        for device in (channel, disk):
            assert not domain_files.without_server(domain(f"<devices>{device.format('127.0.0.1', port)}</devices>"))


def test_client_that_tries_again_needs_no_server() -> None:
    source = "<source mode='connect' path='/none'>{}</source>"
    device = "<devices><channel type='unix'>" + source + "</channel></devices>"
    assert domain_files.without_server(domain(device.format(""))) == ["channel: no process listens on /none"]
    assert domain_files.without_server(domain(device.format("<reconnect enabled='yes' timeout='1'/>"))) == []
    host = "<source protocol='nbd'><host transport='unix' socket='/none'/></source>"
    disk = f"<devices><disk type='network'>{host}</disk></devices>"
    assert domain_files.without_server(domain(disk)) == ["disk: no process listens on /none"]


XML = """<domain type='kvm'><name>web</name><os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type>{}</os>
<devices><emulator>/qemu</emulator>{}</devices></domain>"""


def subject(**fields: Any) -> Any:
    """What is tested, but for the fields that are given."""
    values = {
        "guest": guest(),
        "disks": DISK,
        "process": SimpleNamespace(command_line=["qemu", "-device", "virtio-rng-pci,id=rng0", "-device", "vmcoreinfo"]),
        "xml": XML.format("", ""),
        "live_xml": XML.format("", "<rng><alias name='rng0'/></rng>"),
        **fields,
    }
    return SimpleNamespace(**values)


@pytest.mark.parametrize(("size", "status"), [(65536, Status.PASS), (65537, Status.FAIL)])
def test_firmware_must_have_the_size_that_it_had(tmp_path: Path, size: int, status: Status) -> None:
    path = tmp_path / "code"
    path.write_bytes(bytes(size))
    rom = ElementTree.fromstring(XML.format(f"<loader type='rom'>{path}</loader>", ""))
    blocks = {"pc.bios": RamBlock("pc.bios", 0, 65536, 65536, None, False)}
    assert restart._firmware(rom, subject(guest=guest(blocks=blocks))).status is status
    flash = graph(node("f", str(path), driver="raw", file="p"), node("p", str(path)), qdev="/machine/system.flash0")
    flash.nodes["f"] = Node("f", "raw", str(path), True, False, False, "off", 65536, None, True, (), {"file": "p"})
    assert restart._firmware(domain(""), subject(disks=flash)).status is status


def test_machine_type_alias_fails() -> None:
    assert restart._alias(subject()).status is Status.PASS
    result = restart._alias(subject(xml=XML.format("", "").replace("pc-q35-7.2", "q35")))
    assert (result.status, result.detail) == (
        Status.FAIL,
        "q35 is another machine in each QEMU, and pc-q35-7.2 in this one",
    )
    assert result.hint


@pytest.mark.parametrize(
    ("present", "anonymous", "found"),
    [
        ({"rng0": "virtio-rng-pci"}, ["vmcoreinfo"], ""),
        ({"rng0": "virtio-rng-pci", "vcpu1": "qemu64-x86_64-cpu"}, ["vmcoreinfo"], ""),
        ({"rng0": "virtio-rng-pci", "mine": "usb-kbd"}, ["vmcoreinfo"], "mine (usb-kbd) was plugged"),
        ({}, ["vmcoreinfo"], "rng0 was unplugged"),
        (
            {"rng0": "virtio-rng-pci"},
            ["vmcoreinfo", "usb-kbd"],
            "a device without an id (usb-kbd) was plugged",
        ),
    ],
)
def test_devices_that_libvirt_does_not_know_are_found(
    present: dict[str, str], anonymous: list[str], found: str
) -> None:
    result = restart._plugged(subject(guest=guest(devices=present)), anonymous)
    assert result.status is (Status.FAIL if found else Status.PASS)
    assert result.detail == (f"libvirt does not know that {found}" if found else "libvirt knows all")


@pytest.mark.parametrize(
    ("option", "status"),
    [
        (["-drive", "file=/a,if=virtio"], Status.PASS),
        (["-virtfs", "local,path=/a,mount_tag=a,security_model=none"], Status.PASS),
        (["-drive", "file=/a,if=none,id=a"], Status.FAIL),
    ],
)
def test_device_of_another_option_was_not_plugged(option: list[str], status: Status) -> None:
    """... in <qemu:commandline>: QEMU makes a device of it, without an id."""
    process = SimpleNamespace(command_line=["qemu", *option])
    assert restart._plugged(subject(process=process, guest=guest(devices={})), ["virtio-pci"]).status is status


def test_hooks_of_others_are_those_that_libvirt_runs(tmp_path: Path) -> None:
    (tmp_path / "qemu.d").mkdir()
    ours = tmp_path / "qemu.d" / "sevhop"
    for path in (ours, tmp_path / "qemu.d" / "other", tmp_path / "network", tmp_path / "qemu.d" / "README"):
        path.touch(mode=0o755)
    (tmp_path / "qemu.d" / "README").chmod(0o644)
    result = restart._hooks(tmp_path, ours)
    assert (result.status, bool(result.hint)) == (Status.PASS, True)
    assert result.detail == f"libvirt calls others as well: {tmp_path}/qemu.d/other, {tmp_path}/network"
    assert restart._hooks(tmp_path / "none", ours).detail == "no others"
