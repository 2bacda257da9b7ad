"""The session that a hop was started from ends, or is suspended: the guest keeps running."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.guests.running import Guest, wait_ended

from .conftest import DescribeCounter, StartGuest
from .hops import assert_unharmed

#: The command, which at the beginning of a phase does something to itself.
PROGRAM = """
import asyncio, os, signal, sys
from sevhop.cli.main import main
from sevhop.engine.transaction import Transaction

phase, monitor, emulator, reached = sys.argv[1:]
run_phase = Transaction.run_phase

async def halting(self, name, work):
    async def halted():
        if name == phase:
            os.write(int(reached), b"reached")
            await asyncio.to_thread(sys.stdin.readline)
        return await work
    return await run_phase(self, name, halted())

Transaction.run_phase = halting
sys.exit(main(["--verbose", "hop", "--qmp", monitor, "--emulator", emulator]))
"""
INTERRUPTING = [signal.SIGHUP, signal.SIGQUIT, signal.SIGINT, signal.SIGTERM]


@pytest.fixture
def guest(old: Path, counter_machine: DescribeCounter, start: StartGuest) -> Guest:
    """A counting guest in the older QEMU, with a disk."""
    guest = start(counter_machine(disk_mib=16), old)
    guest.wait_for_ticks(5)
    return guest


class WaitingHop:
    """A hop that waits at the beginning of a phase until it is continued."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def proceed(self) -> int:
        """:return: its exit status."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.process.wait(60)


def waiting_at(phase: str, guest: Guest, emulator: Path, *wrapper: str) -> Iterator[WaitingHop]:
    # Not on its stderr: another thread of it writes there, and may do so in the middle of the line.
    reached, theirs = os.pipe()
    command = [*wrapper, sys.executable, "-c", PROGRAM, phase, str(guest.machine.monitor), str(emulator), str(theirs)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, pass_fds=[theirs]) as process:
        os.close(theirs)
        try:
            ready, _, _ = select.select([reached], [], [], 60)
            if not ready or not os.read(reached, 16):
                process.kill()
                raise AssertionError(f"the hop did not reach phase {phase}: {process.communicate()}")
            yield WaitingHop(process)
        finally:
            os.close(reached)
            process.kill()


@pytest.mark.parametrize("number", INTERRUPTING)
def test_signal_of_an_ending_session_rolls_the_hop_back(number: signal.Signals, guest: Guest, new: Path) -> None:
    pid = guest.pid
    for waiting in waiting_at("map", guest, new):
        waiting.process.send_signal(number)
        assert waiting.proceed() == 3
    assert guest.pid == pid
    assert guest.execute("query-status")["status"] == "running"
    assert_unharmed(guest)


def test_hop_is_not_stopped_by_the_terminal(guest: Guest, new: Path) -> None:
    for waiting in waiting_at("map", guest, new):
        waiting.process.send_signal(signal.SIGTSTP)
        assert waiting.proceed() == 0
    assert_unharmed(guest)


def test_nohup_is_respected(guest: Guest, new: Path) -> None:
    for waiting in waiting_at("map", guest, new, "nohup"):
        waiting.process.send_signal(signal.SIGHUP)
        assert waiting.proceed() == 0
    assert_unharmed(guest)


def test_destination_gets_the_default_signal_actions(guest: Guest, old: Path, new: Path) -> None:
    """It ignores no signal that the source does not ignore."""

    def ignored() -> int:
        status = Path(f"/proc/{guest.pid}/status").read_text()
        return int(status.partition("SigIgn:")[2].split()[0], 16)

    before = ignored()
    for waiting in waiting_at("map", guest, new):
        assert waiting.proceed() == 0
    assert f"{ignored() & ~before:#x}" == "0x0"


def test_closed_output_does_not_interrupt_a_hop(guest: Guest, new: Path) -> None:
    for waiting in waiting_at("map", guest, new):
        assert waiting.process.stdout is not None
        assert waiting.process.stderr is not None
        waiting.process.stdout.close()
        waiting.process.stderr.close()
        assert waiting.proceed() == 0
    assert_unharmed(guest)


def test_blocked_output_does_not_delay_a_hop(guest: Guest, new: Path) -> None:
    """As on a terminal after Ctrl-S, or on a dropped connection."""
    pid = guest.pid
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    try:
        while True:
            os.write(theirs, bytes(4096))
    except BlockingIOError:
        os.set_blocking(theirs, True)
    command = [sys.executable, "-m", "sevhop.cli", "--verbose", "hop", "--qmp", str(guest.machine.monitor)]
    with subprocess.Popen([*command, "--emulator", str(new)], stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        try:
            assert wait_ended(pid, 60)
            guest.wait_for_ticks(3)
            assert process.poll() is None
        finally:
            os.close(ours)
        assert process.wait(60) == 0
    assert_unharmed(guest)
