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


def test_the_program_in_the_document(guest: Guest) -> None:
    (program,) = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    assert program.count("/run/vm/qmp.sock") == 2
    program = program.replace("/run/vm/qmp.sock", str(guest.machine.monitor))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    words = [line.split(":")[0] for line in done.stdout.splitlines()]
    phases = ["check", "hold", "prepare", "freeze", "share", "save", "load", "commit", "resume", "retire"]
    assert [word for word in words if word in phases] == phases
    assert "it was stopped for" in done.stdout
    assert re.search(r"QEMU 7\.2\.\d+ -> 7\.2\.\d+, now process \d+; blackout", done.stdout)
    guest.wait_for_ticks(5)


def test_what_is_told(guest: Guest, new: Path) -> None:
    """Once the guest runs: all of it, in order, with the times at which it happened."""
    heard: list[api.Event] = []
    report = asyncio.run(api.hop(guest.machine.monitor, emulator=str(new), listener=heard.append))
    assert report.outcome == "done"
    assert [event.at for event in heard] == sorted(event.at for event in heard)
    kinds = [type(event) for event in heard]
    stopped, runs = kinds.index(api.GuestStopped), kinds.index(api.GuestRuns)
    phases = [event.phase for event in heard[stopped:runs] if isinstance(event, api.PhaseBegan)]
    assert phases == ["share", "save", "load", "commit", "resume"]
    last = heard[-1]
    assert isinstance(last, api.Ended) and last.report is report
    assert all(isinstance(event, api.GuestEvent) and event.guest == str(guest.machine.monitor) for event in heard)


def test_cancelled(guest: Guest, new: Path) -> None:
    pid = guest.pid
    heard: list[api.Event] = []

    async def cancelled() -> None:
        def listener(event: api.Event) -> None:
            heard.append(event)
            if isinstance(event, api.PhaseBegan) and event.phase == "prepare":
                task.cancel()

        task = asyncio.ensure_future(api.hop(guest.machine.monitor, emulator=str(new), listener=listener))
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancelled())
    last = heard[-1]
    assert isinstance(last, api.Ended) and (last.report.outcome, last.report.reason) == ("undone", "interrupted")
    assert guest.pid == pid
    guest.wait_for_ticks(5)
