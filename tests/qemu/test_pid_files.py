"""The pid file of a guest names the QEMU that has it, and goes away with it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.guests.machine import Machine
from tests.support.guests.running import Guest, wait_ended

from .conftest import DescribeCounter, StartGuest
from .hops import Meddler, hop, sevhop


def daemon(machine: Machine, emulator: Path, pidfile: str) -> Guest:
    """A guest in a QEMU that has gone to the background."""
    command = [*machine.command(emulator), "-pidfile", pidfile, "-daemonize"]
    subprocess.run(command, cwd=machine.directory, check=True, capture_output=True)
    return Guest(machine, subprocess.Popen(["true"]))


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_pid_file_goes_away_with_the_guest(
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


def test_pid_file_of_somebody_else_stays(
    old: Path, new: Path, tmp_path: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    """The path has been given to another QEMU since."""
    pidfile = tmp_path / "qemu.pid"
    guest = start(counter_machine(more=("-pidfile", str(pidfile))), old)
    hop(guest, new)
    pid = guest.pid
    pidfile.unlink()
    pidfile.write_text(f"{pid + 1}\n")
    guest.execute("quit")
    assert wait_ended(pid, 20)
    assert pidfile.read_text() == f"{pid + 1}\n"


def test_relative_pid_file_of_a_daemon_is_where_it_was(
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


def test_relative_pid_file_of_a_daemon_that_is_not_to_be_found_refuses(
    old: Path, new: Path, tmp_path: Path, counter_machine: DescribeCounter
) -> None:
    guest = daemon(counter_machine(), old, "qemu.pid")
    try:
        guest.wait_for_ticks(3)
        (tmp_path / "qemu.pid").write_text("1\n")  # what QEMU has open says so as well
        done = sevhop("hop", "--source", guest.machine.monitor, "--emulator", new)
        assert done.returncode == 1
        assert "the pid file qemu.pid of process" in done.stderr
        guest.wait_for_ticks(3)
    finally:
        guest.kill()


def test_directory_that_was_exchanged_is_not_touched(
    old: Path, new: Path, tmp_path: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    """QEMU's user may write to it, so it could be a link to one of root's by now."""
    directory, others = tmp_path / "vm", tmp_path / "others"
    directory.mkdir()
    others.mkdir()
    guest = start(counter_machine(more=("-pidfile", str(directory / "qemu.pid"))), old)
    guest.wait_for_ticks(3)

    def exchange(_: object) -> None:
        (temporary,) = directory.glob("qemu.pid.hop-*")
        (others / temporary.name).write_text("planted\n")
        directory.rename(tmp_path / "moved")
        directory.symlink_to(others)

    report = Meddler().run(guest, new, at="retire", mischief=exchange)
    assert report.outcome == "done"
    assert any("is not the directory that it was" in note for note in report.notes)
    assert not (others / "qemu.pid").exists()
    guest.wait_for_ticks(3)
