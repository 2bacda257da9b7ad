"""The destination's command line, derived from the source's."""

from __future__ import annotations

import pytest
from sevhop.guest.command_line import (
    PRIVATE_MONITOR,
    derive,
    incoming,
    memory_backends,
    parse,
    properties,
    with_machine_type,
)

TOKEN = "0123abcd"


def derived(*argv: str) -> list[str]:
    result = derive("/usr/bin/qemu", list(argv), TOKEN)
    assert not result.refused
    return result.arguments


@pytest.mark.parametrize(
    "argv",
    [
        ["-m", "256", "-nodefaults", "-display", "none"],
        ["--machine", "q35", "-enable-kvm", "disk.img"],
        ["-qmp", "unix:/run/vm.qmp,server=on,wait=off"],
        ["-netdev", "user,id=n0,hostfwd=tcp::2222-:22", "-device", "virtio-net-pci,netdev=n0"],
        ["-vnc", ":1", "-spice", "port=5930,disable-ticketing=on"],
        ["-serial", "file:/var/log/serial.log", "-chardev", "pty,id=p", "-gdb", "tcp::1234"],
        ["-blockdev", "driver=qcow2,node-name=d,file.driver=file,file.filename=/a,,b.qcow2"],
    ],
)
def test_shareable_option_is_unchanged(argv: list[str]) -> None:
    expected = [word.replace("--machine", "-machine") for word in argv]
    assert derived(*argv) == expected


def test_option_for_the_start_of_the_source_is_dropped() -> None:
    argv = ["-daemonize", "-m", "64", "-S", "-incoming", "tcp:0:4444", "-loadvm", "snap"]
    assert derived(*argv) == ["-m", "64"]


def test_option_of_an_earlier_hop_is_dropped() -> None:
    first = incoming(["-m", "64"], 7)
    assert first[-3:] == ["-S", "-incoming", "defer"]
    assert derived(*first) == ["-m", "64"]


def test_derived_command_line_has_no_option_twice() -> None:
    argv = incoming(["-m", "64", "-S", "-incoming", "defer"], 9)
    assert argv.count("-incoming") == 1
    assert argv.count("-S") == 1
    assert f"socket,id={PRIVATE_MONITOR},fd=9,server=on,wait=off" in argv


def test_pidfile_is_temporary_and_keeps_its_name_over_hops() -> None:
    first = derive("/usr/bin/qemu", ["-pidfile", "/run/vm.pid"], TOKEN)
    assert first.pidfile == ("/run/vm.pid.hop-0123abcd", "/run/vm.pid")
    assert first.arguments == ["-pidfile", "/run/vm.pid.hop-0123abcd"]
    second = derive("/usr/bin/qemu", first.arguments, "ffff0000")
    assert second.pidfile == ("/run/vm.pid.hop-ffff0000", "/run/vm.pid")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("unix:/run/s,server=on", "unix:/run/s,server=on,wait=off"),
        ("unix:/run/s,server=on,wait=on", "unix:/run/s,server=on,wait=off"),
        ("unix:/run/s,server,nowait", "unix:/run/s,server,wait=off"),
        ("telnet:localhost:4555,server=on,wait=off", "telnet:localhost:4555,server=on,wait=off"),
    ],
)
def test_server_sockets_do_not_wait_for_a_client(before: str, after: str) -> None:
    assert derived("-serial", before) == ["-serial", after]


def test_json_server_socket_does_not_wait() -> None:
    address = '{"type": "unix", "data": {"path": "/s"}}'
    value = f'{{"id": "c", "backend": {{"type": "socket", "data": {{"addr": {address}, "wait": true}}}}}}'
    (_, after) = derived("-chardev", value)
    assert '"wait": false' in after


@pytest.mark.parametrize(
    ("argv", "option"),
    [
        (["-netdev", "tap,id=n,ifname=tap0"], "tap"),
        (["-nic", "bridge,br=br0"], "bridge"),
        (["-netdev", "tap,id=n,fd=7"], "inherited"),
        (["-netdev", '{"type": "tap", "id": "n", "fds": "7:8"}'], "inherited"),
        (["-chardev", "socket,id=c,fd=5,server=on"], "inherited"),
        (["-add-fd", "fd=3,set=1"], "inherited"),
        (["-drive", "file=/dev/fdset/1"], "inherited"),
        (["-chardev", "socket,id=c,path=/run/swtpm.sock"], "one client"),
        (["-serial", "tcp:localhost:4444"], "one client"),
        (["-chardev", "stdio,id=c"], "standard input"),
        (["-serial", "mon:stdio"], "standard input"),
        (["-chardev", "pipe,id=c,path=/tmp/p"], "pipe"),
        (["-nographic"], "standard input"),
        (["-device", "vfio-pci,host=01:00.0"], "vfio"),
        (["-device", '{"driver": "vhost-vsock-pci", "guest-cid": 3}'], "vhost-vsock"),
        (["-device", "virtio-mem-pci,memdev=m"], "discards its contents"),
        (["-tpmdev", "emulator,id=t,chardev=c"], "TPM"),
        (["-snapshot"], "snapshot"),
        (["-drive", "file=a.img,snapshot=on"], "snapshot"),
        (["-display", "curses"], "terminal"),
        (["-vnc", "localhost:1,reverse=on"], "VNC"),
    ],
)
def test_option_that_cannot_be_shared_is_refused(argv: list[str], option: str) -> None:
    (reason,) = derive("/usr/bin/qemu", argv, TOKEN).refused
    assert reason.startswith(" ".join(argv))
    assert option in reason


def test_nographic_without_the_terminal_is_accepted() -> None:
    assert derived("-nographic", "-serial", "null", "-monitor", "none")
    assert derived("-nographic", "-nodefaults")


def test_options_are_split_as_by_qemu() -> None:
    options = parse(["-S", "disk.img", "--name", "x", "-m"])
    assert [(option.name, option.value) for option in options] == [
        ("S", None),
        ("", "disk.img"),
        ("name", "x"),
        ("m", ""),
    ]


def test_properties_of_both_forms_are_parsed() -> None:
    assert properties("driver,a=1,b,c=x,,y") == {"": "driver", "a": "1", "b": "on", "c": "x,y"}
    assert properties('{"driver": "d", "n": {"on": true}}') == {"driver": "d", "n.on": "on"}
    assert properties("{broken") == {}


def test_memory_backends_are_found_by_their_ids() -> None:
    argv = [
        *("-object", "memory-backend-memfd,id=ram-node0,size=1G,share=on"),
        *("-object", '{"qom-type": "memory-backend-memfd", "id": "memdimm0", "size": 1}'),
        *("-object", "secret,id=masterKey0", "-device", "pc-dimm,id=dimm0,memdev=memdimm0"),
    ]
    assert memory_backends(argv) == {"ram-node0", "memdimm0"}


@pytest.mark.parametrize(
    "flag", ["perfmap", "jitdump", "async-teardown", "audio-help", "xen-attach", "no-fd-bootchk", "only-migratable"]
)
def test_option_without_argument_does_not_take_the_next_one(flag: str) -> None:
    argv = [f"-{flag}", "-sandbox", "on", "-m", "64"]
    assert [option.name for option in parse(argv)] == [flag, "sandbox", "m"]
    assert derived(*argv) == argv


@pytest.mark.parametrize(
    ("argv", "path"),
    [
        (("-chardev", "file,id=c,path=serial.log"), "serial.log"),
        (("-chardev", "socket,id=c,path=/run/a,server=on,logfile=log/a"), "log/a"),
        (("-serial", "file:serial.log"), "serial.log"),
        (("-D", "qemu.log"), "qemu.log"),
    ],
)
def test_relative_log_of_a_daemon_is_refused(argv: tuple[str, ...], path: str) -> None:
    (reason,) = derive("/usr/bin/qemu", [*argv, "-daemonize"], TOKEN).refused
    assert reason == f"{' '.join(argv)}: {path} is relative to a directory that -daemonize has left"
    assert not derive("/usr/bin/qemu", list(argv), TOKEN).refused
    absolute = [word.replace(path, f"/var/{path}") for word in argv]
    assert not derive("/usr/bin/qemu", [*absolute, "-daemonize"], TOKEN).refused


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["-machine", "q35,accel=kvm"], ["-machine", "pc-q35-7.2,accel=kvm"]),
        (["-M", "accel=kvm,type=q35", "-m", "64"], ["-M", "accel=kvm,type=pc-q35-7.2", "-m", "64"]),
        (["-machine", "pc-q35-7.2", "-machine", "usb=off"], ["-machine", "pc-q35-7.2", "-machine", "usb=off"]),
        (["-machine", "usb=off"], ["-machine", "usb=off", "-machine", "type=pc-q35-7.2"]),
        (["-device", "q35,type=a"], ["-device", "q35,type=a", "-machine", "type=pc-q35-7.2"]),
    ],
)
def test_destination_has_the_machine_type_itself(argv: list[str], expected: list[str]) -> None:
    assert with_machine_type(argv, "pc-q35-7.2") == expected
