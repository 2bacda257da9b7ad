"""Hops that arrive: what the guest keeps, and what an administrator finds afterwards."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
from pathlib import Path

import pytest
from sevhop_qmp.process import QemuProcess

from tests.support.guests import counter
from tests.support.guests.machine import I440FX, Q35
from tests.support.guests.running import wait_until

from .conftest import DescribeCounter, StartGuest
from .hops import HopDriver, assert_unharmed, hop, sevhop


@pytest.mark.parametrize("machine_type", [Q35, I440FX])
@pytest.mark.parametrize("rich", [False, True])
def test_guest_is_unharmed_after_hops_there_and_back(
    machine_type: str, rich: bool, old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    guest = start(counter_machine(type=machine_type, rich=rich, network=rich, disk_mib=16 if rich else 0), old)
    guest.wait_for_ticks(5)
    for emulator in (new, old, new):
        report = hop(guest, emulator)
        assert report.downtime_ms is not None
        assert guest.pid == report.destination_pid
        guest.wait_for_ticks(5)
    assert_unharmed(guest)


def test_guest_is_unharmed_after_hops_under_tcg(
    old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    guest = start(counter_machine(accelerator="tcg", cpus=2), old)
    guest.wait_for_ticks(5)
    hop(guest, new)
    hop(guest, old)
    assert_unharmed(guest)


@pytest.mark.parametrize("fields", [{}, {"accelerator": "tcg"}], ids=["accelerator", "tcg"])
def test_guest_that_waits_for_interrupts_hops(
    fields: dict[str, str], old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    """A timer that is lost, or an interrupt that nobody has acknowledged, would leave it halted for ever."""
    guest = start(counter_machine(bios=counter.firmware(idle=True), **fields), old)
    guest.wait_for_ticks(5)
    for emulator in (new, old, new, old):
        hop(guest, emulator)
        guest.wait_for_ticks(5)
    assert_unharmed(guest)


def test_guest_with_an_alias_as_machine_type_hops(
    old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    """``q35`` is another machine type in each QEMU; the destination has the guest's."""
    guest = start(counter_machine(type="q35"), old)
    guest.wait_for_ticks(5)
    checked = sevhop("check", "--qmp", guest.machine.monitor, "--emulator", new)
    assert checked.returncode == 0, checked
    for emulator in (new, old):
        hop(guest, emulator)
        guest.wait_for_ticks(5)
        assert guest.execute("qom-get", path="/machine", property="type") == f"{Q35}-machine"
    assert_unharmed(guest)


def memory_of(pid: int) -> tuple[tuple[str, int], str]:
    """Inode of the guest memory that a QEMU has mapped, and what it may do to it."""
    process = QemuProcess.open(pid)
    try:
        (mapping,) = (m for m in process.mappings() if m.path.startswith("/memfd:memory-backend-memfd"))
        return (mapping.device, mapping.inode), mapping.permissions
    finally:
        process.close()


def test_destination_maps_the_sources_own_pages(
    old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    """The destination's start-up leaves the running guest's memory alone; then it maps the very same inode."""
    guest = start(counter_machine(memory_mib=64), old)
    guest.wait_for_ticks(5)
    before = memory_of(guest.pid)
    source = QemuProcess.open(guest.pid)
    (mapping,) = (m for m in source.mappings() if m.path.startswith("/memfd:memory-backend-memfd"))

    def digest() -> str:
        # What the guest itself never writes: above its pattern, and where firmware would put its tables.
        with source.memory() as memory:
            parts = [(0x1000, 0x6000), (0xC0000, 0x40000), (counter.PATTERN_END, 64 << 20)]
            return hashlib.sha256(
                b"".join(os.pread(memory, end - first, mapping.start + first) for first, end in parts if end > first)
            ).hexdigest()

    at_freeze: list[object] = []
    before_start = digest()
    report = HopDriver().run(
        guest,
        new,
        at="stop",
        fault=lambda hop: at_freeze.extend([digest(), memory_of(hop.report.destination_pid)]),
    )
    source.close()
    assert at_freeze == [before_start, (before[0], "r--s")], "unchanged, and not to be written until the hand-over"
    assert memory_of(report.destination_pid) == before
    assert_unharmed(guest)


def test_paused_guest_stays_paused(old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest) -> None:
    guest = start(counter_machine(), old)
    guest.wait_for_ticks(5)
    guest.execute("stop")
    ticks = guest.seen().ticks
    report = hop(guest, new)
    assert report.downtime_ms is None
    assert guest.execute("query-status")["status"] == "paused"
    assert guest.seen().ticks == ticks
    guest.execute("cont")
    assert_unharmed(guest)


def test_guest_boots_when_reset_after_a_hop(
    old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    """The firmware is in a RAM block of its own, which no device state has in it."""
    guest = start(counter_machine(), old)
    guest.wait_for_ticks(5)
    hop(guest, new)
    guest.execute("system_reset")
    wait_until(lambda: guest.seen().restarts == 1, 30, "the guest starts again")
    guest.wait_for_ticks(5)
    hop(guest, old)
    guest.wait_for_ticks(5)
    verdict = guest.stop()
    assert (verdict.restarts, verdict.ticks_repeated, verdict.ticks_lost, verdict.memory_errors) == (1, 0, 0, 0)


def cached(path: Path) -> int:
    """How many pages of a file the kernel has in its page cache."""
    command = ["fincore", "--noheadings", "--output", "PAGES", str(path)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_disk_images_stay_in_the_page_cache(
    old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    """Otherwise the guest would wait for the disk: its new QEMU reads an image's tables before it lets it run."""
    guest = start(counter_machine(disk_mib=16), old)
    guest.wait_for_ticks(5)
    image = guest.machine.disk
    os.sync()  # what is not written yet would stay anyway
    image.read_bytes()
    before = cached(image)
    assert before
    hop(guest, new)
    assert cached(image) == before


def talk(path: Path) -> str:
    """The first line that a stream socket sends."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(str(path))
        return sock.makefile().readline()


def test_sockets_pidfile_and_logs_are_the_new_qemus(
    tmp_path: Path, old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    second, line, pidfile = tmp_path / "second.sock", tmp_path / "line.sock", tmp_path / "qemu.pid"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    more = (
        *("-qmp", f"unix:{second},server=on,wait=off"),
        *("-chardev", f"socket,id=line,path={line},server=on,wait=off", "-serial", "chardev:line"),
        *("-monitor", f"tcp:127.0.0.1:{port},server=on,wait=off"),
        *("-vnc", f"unix:{tmp_path / 'vnc.sock'}"),
        *("-pidfile", str(pidfile)),
    )
    guest = start(counter_machine(more=more), old)
    guest.wait_for_ticks(5)
    for emulator, version in ((new, "10"), (old, "7.2")):
        report = hop(guest, emulator)
        assert report.destination_version.startswith(version)
        assert int(pidfile.read_text()) == report.destination_pid
        assert json.loads(talk(second))["QMP"]["version"]["qemu"]["major"] == int(version.split(".")[0])
        assert talk(tmp_path / "vnc.sock").startswith("RFB")
        with socket.create_connection(("127.0.0.1", port), timeout=10) as hmp:
            assert f"QEMU {version}" in hmp.makefile().readline()
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(line))
        guest.wait_for_ticks(3)
    assert not list(tmp_path.glob("*.hop-*")), "temporary names are gone"
    assert_unharmed(guest)


def test_messages_go_to_stderr_of_the_source(
    old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    guest = start(counter_machine(), old)
    hop(guest, new)
    for number in (1, 2):
        assert os.readlink(f"/proc/{guest.pid}/fd/{number}") == str(guest.machine.messages)


def test_destination_is_like_the_source(
    tmp_path: Path, old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    guest = start(counter_machine(), old)
    source = QemuProcess.open(guest.pid)
    before = (source.credentials, source.working_directory, source.limits, source.cgroups)
    source.close()
    report = hop(guest, new)
    destination = QemuProcess.open(report.destination_pid)
    assert (destination.credentials, destination.working_directory, destination.limits, destination.cgroups) == before
    destination.close()


def test_command_line_checks_and_hops(
    old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    guest = start(counter_machine(), old)
    guest.wait_for_ticks(5)
    checked = sevhop("check", "--qmp", guest.machine.monitor, "--emulator", new)
    assert checked.returncode == 0, checked
    assert "PASS memory: 32 MiB in 1 shared memfd(s)" in checked.stdout
    assert "FAIL" not in checked.stdout

    done = sevhop("hop", "--qmp", guest.machine.monitor, "--emulator", new, "--json")
    assert done.returncode == 0, done
    report = json.loads(done.stdout)
    assert report["outcome"] == "done"
    assert report["context"] == "none"
    assert report["destination"]["pid"] == guest.pid
    names = [phase["name"] for phase in report["phases"]]
    assert names == ["check", "acquire", "prepare", "stop", "map", "save", "load", "commit", "resume", "finish"]

    command = guest.machine.command(old)
    back = sevhop("hop", "--qmp", guest.machine.monitor, "--", *command)
    assert back.returncode == 0, back
    assert len(back.stdout.splitlines()) == 1
    assert "downtime" in back.stdout
    assert_unharmed(guest)


def test_default_is_the_sources_own_emulator(old: Path, counter_machine: DescribeCounter, start: StartGuest) -> None:
    guest = start(counter_machine(), old)
    guest.wait_for_ticks(3)
    report = HopDriver().run(guest, None)
    assert report.destination_version == report.source_version
    assert_unharmed(guest)
