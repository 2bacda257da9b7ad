"""The interface for Python, on real QEMUs: the program in docs/python.md, and a hop that is cancelled."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sevhop import api

from tests.support.guests.running import Guest

from .conftest import DescribeCounter, StartGuest

DOCUMENT = Path(__file__).parents[2] / "docs" / "python.md"


@pytest.fixture
def guest(old: Path, counter_machine: DescribeCounter, start: StartGuest) -> Guest:
    """A guest that counts."""
    guest = start(counter_machine(), old)
    guest.wait_for_ticks(5)
    return guest


def test_documented_program_performs_a_hop(guest: Guest) -> None:
    (program,) = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    assert program.count("/run/vm/qmp.sock") == 2
    program = program.replace("/run/vm/qmp.sock", str(guest.machine.monitor))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    printed = [line.split(":")[0] for line in done.stdout.splitlines()]
    phases = ["check", "acquire", "prepare", "stop", "map", "save", "load", "commit", "resume", "finish"]
    assert [name for name in printed if name in phases] == phases
    assert "downtime: " in done.stdout
    assert re.search(r"QEMU 7\.2\.\d+ -> 7\.2\.\d+, now process \d+; downtime", done.stdout)
    guest.wait_for_ticks(5)


def test_listener_receives_all_events_in_order(guest: Guest, new: Path) -> None:
    """All of them, in order, with the times at which they happened."""
    received: list[api.Event] = []
    report = asyncio.run(api.hop(guest.machine.monitor, api.HopOptions(emulator=str(new)), listener=received.append))
    assert report.outcome == "done"
    assert [event.at for event in received] == sorted(event.at for event in received)
    kinds = [type(event) for event in received]
    stopped, runs = kinds.index(api.GuestStopped), kinds.index(api.GuestResumed)
    phases = [event.phase for event in received[stopped:runs] if isinstance(event, api.PhaseBegan)]
    assert phases == ["map", "save", "load", "commit", "resume"]
    last = received[-1]
    assert isinstance(last, api.HopFinished) and last.report is report
    assert all(isinstance(event, api.GuestEvent) and event.guest == str(guest.machine.monitor) for event in received)


def test_cancelled_hop_is_rolled_back(guest: Guest, new: Path) -> None:
    pid = guest.pid
    received: list[api.Event] = []

    async def cancelled() -> None:
        def listener(event: api.Event) -> None:
            received.append(event)
            if isinstance(event, api.PhaseBegan) and event.phase == "prepare":
                task.cancel()

        task = asyncio.ensure_future(
            api.hop(guest.machine.monitor, api.HopOptions(emulator=str(new)), listener=listener)
        )
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancelled())
    last = received[-1]
    assert isinstance(last, api.HopFinished) and (last.report.outcome, last.report.reason) == (
        "rolled-back",
        "interrupted",
    )
    assert guest.pid == pid
    guest.wait_for_ticks(5)
