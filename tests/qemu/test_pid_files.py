"""The pid file of a guest contains the pid of its QEMU, and is removed with it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.guests.machine import Machine
from tests.support.guests.running import Guest, wait_ended

from .conftest import DescribeCounter, StartGuest
from .hops import HopDriver, hop, sevhop


def daemon(machine: Machine, emulator: Path, pidfile: str) -> Guest:
    """A guest in a QEMU with -daemonize."""
    command = [*machine.command(emulator), "-pidfile", pidfile, "-daemonize"]
    subprocess.run(command, cwd=machine.directory, check=True, capture_output=True)
    return Guest(machine, subprocess.Popen(["true"]))


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_pid_file_is_removed_with_the_guest(
    hops: int, old: Path, new: Path, tmp_path: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    pidfile = tmp_path / "qemu.pid"
    guest = start(counter_machine(more=("-pidfile", str(pidfile))), old)
    guest.wait_for_ticks(3)
    for number in range(hops):
        hop(guest, old if number % 2 else new)
        assert int(pidfile.read_text()) == guest.pid
    pid = guest.pid
    guest.execute("quit")
    assert wait_ended(pid, 20)
    assert not list(tmp_path.glob("qemu.pid*"))


def test_pid_file_of_another_qemu_is_kept(
    old: Path, new: Path, tmp_path: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    """The path is used by another QEMU meanwhile."""
    pidfile = tmp_path / "qemu.pid"
    guest = start(counter_machine(more=("-pidfile", str(pidfile))), old)
    hop(guest, new)
    pid = guest.pid
    pidfile.unlink()
    pidfile.write_text(f"{pid + 1}\n")
    guest.execute("quit")
    assert wait_ended(pid, 20)
    assert pidfile.read_text() == f"{pid + 1}\n"


def test_relative_pid_file_of_a_daemon_keeps_its_directory(
    old: Path, new: Path, tmp_path: Path, counter_machine: DescribeCounter
) -> None:
    guest = daemon(counter_machine(), old, "qemu.pid")
    try:
        guest.wait_for_ticks(3)
        for emulator in (new, old):
            hop(guest, emulator)
            assert int((tmp_path / "qemu.pid").read_text()) == guest.pid
        assert not Path("/qemu.pid").exists()
        pid = guest.pid
        guest.execute("quit")
        assert wait_ended(pid, 20)
        assert not (tmp_path / "qemu.pid").exists()
    finally:
        guest.kill()


def test_relative_pid_file_of_a_daemon_that_cannot_be_found_refuses(
    old: Path, new: Path, tmp_path: Path, counter_machine: DescribeCounter
) -> None:
    guest = daemon(counter_machine(), old, "qemu.pid")
    try:
        guest.wait_for_ticks(3)
        (tmp_path / "qemu.pid").write_text("1\n")  # the file that QEMU has open has that content, too
        done = sevhop("hop", "--qmp", guest.machine.monitor, "--emulator", new)
        assert done.returncode == 1
        assert "cannot find the pid file qemu.pid of process" in done.stderr
        guest.wait_for_ticks(3)
    finally:
        guest.kill()


def test_directory_that_was_replaced_is_not_touched(
    old: Path, new: Path, tmp_path: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    """QEMU's user may write to it, so it could be a link to one of root by now."""
    directory, others = tmp_path / "vm", tmp_path / "others"
    directory.mkdir()
    others.mkdir()
    guest = start(counter_machine(more=("-pidfile", str(directory / "qemu.pid"))), old)
    guest.wait_for_ticks(3)

    def replace(_: object) -> None:
        (temporary,) = directory.glob("qemu.pid.hop-*")
        (others / temporary.name).write_text("planted\n")
        directory.rename(tmp_path / "moved")
        directory.symlink_to(others)

    report = HopDriver().run(guest, new, at="finish", fault=replace)
    assert report.outcome == "done"
    assert any("another process has replaced the directory" in note for note in report.notes)
    assert not (others / "qemu.pid").exists()
    guest.wait_for_ticks(3)
