"""
Which QEMU has the guest when the command was killed right after the new one started it, before that was recorded; and
that nobody can resume the old one.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sevhop.records import journal
from sevhop_qmp.errors import MonitorError
from sevhop_qmp.monitor import Monitor
from sevhop_qmp.process import QemuProcess

from tests.support.guests.running import Guest, processes_of, wait_ended, wait_until

from .conftest import DescribeCounter, StartGuest
from .hops import assert_unharmed, sevhop
from .interrupted import interrupt_hop, recover

#: A hop whose command is killed when the new QEMU has reported that the guest runs, and before the command reads that.
KILLED = """
import os, pathlib, select, signal, sys, asyncio
from sevhop.engine import hop as engine
from sevhop.options import HopOptions

load = engine.load

async def load_and_die(hop, options, checked, prepared, stopped):
    end = prepared.transfer.end

    async def end_and_die():
        await end()
        select.select([prepared.started.keeper._ours], [], [], 60)
        os.kill(os.getpid(), signal.SIGKILL)

    prepared.transfer.end = end_and_die
    await load(hop, options, checked, prepared, stopped)

engine.load = load_and_die
asyncio.run(engine.Hop(pathlib.Path(sys.argv[1]), HopOptions(emulator=sys.argv[2])).run())
"""


#: A hop whose command and source are killed when the new QEMU was given everything, and before it has read that.
BOTH_KILLED = """
import os, pathlib, signal, sys, asyncio
from sevhop.engine import hop as engine
from sevhop.options import HopOptions

load = engine.load

async def load_and_die(hop, options, checked, prepared, stopped):
    end = prepared.transfer.end

    async def end_and_die():
        assert await prepared.started.destination.process.freeze(10)
        await end()
        checked.source.kill()
        assert await checked.source.wait(10)
        os.kill(os.getpid(), signal.SIGKILL)

    prepared.transfer.end = end_and_die
    await load(hop, options, checked, prepared, stopped)

engine.load = load_and_die
asyncio.run(engine.Hop(pathlib.Path(sys.argv[1]), HopOptions(emulator=sys.argv[2])).run())
"""


class Left:
    """The guest runs in the new QEMU, and no command knows of it."""

    def __init__(self, guest: Guest, new: Path) -> None:
        self.guest = guest
        self.source = guest.pid
        assert self._hop(new) == -signal.SIGKILL
        (self.destination,) = [pid for pid in processes_of(guest.machine.directory) if pid != self.source]

    def _hop(self, new: Path) -> int:
        ticks = self.guest.seen().ticks
        command = [sys.executable, "-c", KILLED, str(self.guest.machine.monitor), str(new)]
        status = subprocess.run(command, capture_output=True, check=False).returncode
        wait_until(lambda: self.guest.seen().ticks > ticks + 3, 30, "the guest runs in the new QEMU")
        return status

    @property
    def alive(self) -> set[int]:
        return set(processes_of(self.guest.machine.directory))

    def execute(self, command: str) -> None:
        """At the private monitor of the destination."""
        (path,) = Path("/run/sevhop").glob("*/monitor")

        async def once() -> None:
            async with await Monitor.connect(path) as monitor:
                await monitor.execute(command)

        asyncio.run(once())


@pytest.fixture(params=[0, 16], ids=["no disk", "disk"])
def left(
    request: pytest.FixtureRequest, old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> Left:
    guest = start(counter_machine(disk_mib=request.param), old)
    guest.wait_for_ticks(3)
    return Left(guest, new)


def test_recover_finishes_a_hop_whose_guest_runs(left: Left) -> None:
    answer = recover()
    assert (answer["status"], answer["guests"][0]["result"]) == (0, "destination")
    assert left.alive == {left.destination}
    assert left.guest.pid == left.destination
    assert_unharmed(left.guest)


def test_recover_keeps_a_new_qemu_whose_guest_was_stopped(left: Left) -> None:
    """By whomever, or by an error: it is not resumed."""
    left.execute("stop")
    answer = recover()
    (one,) = answer["guests"]
    assert (answer["status"], one["result"], one["detail"]) == (0, "destination", "the guest is paused")
    assert left.alive == {left.destination}
    assert left.guest.execute("query-status")["status"] == "paused"
    left.guest.execute("cont")
    assert_unharmed(left.guest)


def test_recover_leaves_a_new_qemu_that_does_not_answer(left: Left) -> None:
    os.kill(left.destination, signal.SIGSTOP)
    done = sevhop("recover", "--timeout", "1")
    assert done.returncode == 4
    assert "manual action required" in done.stdout
    assert f"process {left.destination}" in done.stdout
    assert left.alive == {left.source, left.destination}
    assert is_halted(left.source)
    os.kill(left.destination, signal.SIGCONT)
    assert recover()["guests"][0]["result"] == "destination"
    assert_unharmed(left.guest)


def test_recover_does_not_resume_the_old_qemu_when_the_new_one_has_exited(left: Left) -> None:
    os.kill(left.destination, signal.SIGKILL)
    assert wait_ended(left.destination, 30)
    ticks = left.guest.seen().ticks
    answer = recover()
    (one,) = answer["guests"]
    assert (answer["status"], one["result"]) == (5, "gone")
    assert left.alive == set()
    assert left.guest.seen().ticks == ticks


def test_recover_halts_an_old_qemu_that_somebody_continued(left: Left) -> None:
    """As long as it is unknown where the guest is, nobody can resume it."""
    os.kill(left.destination, signal.SIGSTOP)
    os.kill(left.source, signal.SIGCONT)
    assert sevhop("recover", "--timeout", "1").returncode == 4
    assert is_halted(left.source)
    os.kill(left.destination, signal.SIGCONT)
    assert recover()["guests"][0]["result"] == "destination"
    assert_unharmed(left.guest)


def test_old_qemu_cannot_be_resumed_by_anybody(left: Left) -> None:
    async def cont() -> None:
        async with await Monitor.connect(left.guest.machine.monitor, greeting_timeout=1.0) as monitor:
            await monitor.execute("cont")

    with pytest.raises(MonitorError):
        asyncio.run(cont())
    assert is_halted(left.source)
    assert recover()["guests"][0]["result"] == "destination"
    assert_unharmed(left.guest)


def test_guest_runs_in_the_new_qemu_if_all_others_have_exited(
    old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    """It has all of the guest, and there is no keeper left that it would have to notify."""
    guest = start(counter_machine(disk_mib=16), old)
    guest.wait_for_ticks(3)
    source = guest.pid
    command = [sys.executable, "-c", BOTH_KILLED, str(guest.machine.monitor), str(new)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    (destination,) = processes_of(guest.machine.directory)
    assert destination != source
    ticks = guest.seen().ticks
    os.kill(destination, signal.SIGCONT)
    wait_until(lambda: guest.seen().ticks > ticks + 3, 30, "the guest runs in the new QEMU")
    answer = recover()
    assert (answer["status"], answer["guests"][0]["result"]) == (0, "destination")
    assert_unharmed(guest)


def is_halted(pid: int) -> bool:
    process = QemuProcess.open(pid)
    try:
        return process.frozen
    finally:
        process.close()


def test_rolled_back_source_is_not_halted(
    old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    guest = start(counter_machine(), old)
    guest.wait_for_ticks(3)
    assert interrupt_hop(guest, new, "after halt 0", "command") == -signal.SIGKILL
    assert is_halted(_source_of_the_hop())
    assert recover()["guests"][0]["result"] == "source"
    assert_unharmed(guest)


def _source_of_the_hop() -> int:
    """From the journal, since its monitor does not answer."""
    (path,) = journal.journals()
    return journal.read(path).source.pid


def test_clients_of_the_source_see_no_shutdown(
    tmp_path: Path, old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    """Nor is there a moment in which the path of one of its sockets is missing."""
    watched = tmp_path / "watched.sock"
    guest: Guest = start(counter_machine(more=("-qmp", f"unix:{watched},server=on,wait=off")), old)
    guest.wait_for_ticks(3)

    async def watch() -> list[str]:
        seen: list[str] = []
        async with await Monitor.connect(watched) as monitor:
            with monitor.events() as events:
                hopping = asyncio.create_task(asyncio.to_thread(sevhop, *hop_of(guest, new)))
                try:
                    while True:
                        seen.append(str((await monitor.next_event(events, timeout=60))["event"]))
                except MonitorError:
                    pass
                assert (await hopping).returncode == 0
        return seen

    inode = watched.stat().st_ino
    assert "SHUTDOWN" not in asyncio.run(watch())
    assert watched.stat().st_ino == inode
    assert_unharmed(guest)


def hop_of(guest: Guest, emulator: Path) -> tuple[str | Path, ...]:
    return ("hop", "--qmp", guest.machine.monitor, "--emulator", emulator)
