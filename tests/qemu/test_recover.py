"""
Hops that are broken off at every step, and what ``sevhop recover`` makes of them.

After each the guest is counted: it goes on, in one QEMU and one only, and has lost nothing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from faults import broken_hop
from faults.broken_hop import BEFORE_THE_STATE_IS_SAVED, RUNNING, SAVED
from faults.table import Cell, FaultTable
from guests.running import Guest, processes_of
from sevhop import journal

from ..conftest import some_of
from .conftest import DescribeCounter, StartGuest
from .test_hop import assert_unharmed, sevhop

PATH = "Outside libvirt: `sevhop hop`"
END = {"source": "old", "destination": "new"}
COLUMNS = {
    "command": "command killed",
    "source": "source killed",
    "destination": "destination killed",
    "error": "command refused",
    "silence": "no answer",
}
COMMANDS = [point for point in (*BEFORE_THE_STATE_IS_SAVED, *SAVED, *RUNNING) if point.startswith("before ")]


@pytest.fixture
def guest(old: Path, counter_machine: DescribeCounter, start: StartGuest) -> Guest:
    """A counting guest in the older QEMU."""
    guest = start(counter_machine(), old)
    guest.wait_for_ticks(3)
    return guest


def break_off(guest: Guest, emulator: Path, point: str, fault: str) -> int:
    """Hop with a fault; the exit status of the hop."""
    command = [sys.executable, "-m", broken_hop.__name__, str(guest.machine.monitor), str(emulator), point, fault]
    tools = str(Path(broken_hop.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": tools}
    return subprocess.run(command, capture_output=True, env=environment, timeout=300, check=False).returncode


def recover(*names: str) -> dict[str, Any]:
    """Run ``sevhop recover``; what it says, and its exit status."""
    done = sevhop("recover", "--json", *names)
    assert done.stderr == "", done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer | {"status": done.returncode}


def note(table: FaultTable, guest: Guest, point: str, fault: str, end: str) -> None:
    """See that the guest runs once and lost nothing, and write that down."""
    assert len(processes_of(guest.machine.directory)) == 1
    verdict = guest.wait_for_ticks(3)
    table.add(PATH, point, COLUMNS[fault], Cell(f"{END[end]} QEMU", verdict.ticks_lost, verdict.ticks_repeated))
    assert verdict.unharmed, verdict
    assert not list(journal.journals())


@pytest.mark.parametrize("point", some_of((*BEFORE_THE_STATE_IS_SAVED, *SAVED, *RUNNING)))
def test_the_command_is_killed(point: str, guest: Guest, old: Path, new: Path, fault_table: FaultTable) -> None:
    assert break_off(guest, new, point, "command") == -signal.SIGKILL
    refused = sevhop("hop", "--source", guest.machine.monitor, "--emulator", new, "--timeout", "2")
    assert refused.returncode == 1
    # While the source's sockets become the destination's, nobody is to be reached at all.
    assert "run: sevhop recover" in refused.stderr or point in ("after quit 0", "before x-sev-adopt-finish 0")
    answer = recover()
    assert answer["status"] == 0, answer
    (one,) = answer["guests"]
    end = one["end"]
    assert (end, one["text"]) in (("source", ""), ("destination", ""))
    assert end == ("destination" if point in RUNNING else "source")
    assert os.readlink(f"/proc/{guest.pid}/exe") == str((old if end == "source" else new).resolve())
    note(fault_table, guest, point, "command", end)
    assert recover() == {"guests": [], "status": 0}
    assert sevhop("hop", "--source", guest.machine.monitor, "--emulator", new).returncode == 0
    assert_unharmed(guest)


@pytest.mark.parametrize("point", some_of((*BEFORE_THE_STATE_IS_SAVED, *SAVED)))
def test_the_destination_is_killed(point: str, guest: Guest, new: Path, fault_table: FaultTable) -> None:
    status = break_off(guest, new, point, "destination")
    there_is_none = point in ("phase hold", "phase prepare")
    assert status == (0 if there_is_none else 3)
    assert recover() == {"guests": [], "status": 0}
    note(fault_table, guest, point, "destination", "destination" if there_is_none else "source")


@pytest.mark.parametrize("point", some_of(RUNNING))
def test_the_destination_is_killed_with_the_guest(
    point: str, guest: Guest, new: Path, fault_table: FaultTable
) -> None:
    """A guest ends with its QEMU, hop or no hop. The source has what it was before, and must not run."""
    break_off(guest, new, point, "destination")
    assert recover()["status"] in (0, 5)
    assert processes_of(guest.machine.directory) == []
    fault_table.add(PATH, point, COLUMNS["destination"], Cell("*ended with its QEMU*", 0, 0))


@pytest.mark.parametrize("point", some_of(BEFORE_THE_STATE_IS_SAVED[:-1]))
def test_the_source_is_killed_with_the_guest(point: str, guest: Guest, new: Path, fault_table: FaultTable) -> None:
    """Likewise. (At the last point it is a matter of a millisecond whether everything has been read.)"""
    assert break_off(guest, new, point, "source") == 5
    assert recover() == {"guests": [], "status": 0}
    assert processes_of(guest.machine.directory) == []
    fault_table.add(PATH, point, COLUMNS["source"], Cell("*ended with its QEMU*", 0, 0))


@pytest.mark.parametrize("point", some_of((*SAVED, *RUNNING)))
def test_the_source_is_killed(point: str, guest: Guest, new: Path, fault_table: FaultTable) -> None:
    """Once its state is saved it is not needed any more."""
    assert break_off(guest, new, point, "source") == 0
    note(fault_table, guest, point, "source", "destination")


@pytest.mark.parametrize("fault", ["error", "silence"])
@pytest.mark.parametrize("point", some_of(COMMANDS))
def test_qemu_refuses_or_does_not_answer(
    point: str, fault: str, guest: Guest, new: Path, fault_table: FaultTable
) -> None:
    status = break_off(guest, new, point, fault)
    assert status == (0 if point in RUNNING else 3)
    recovered = recover()
    assert recovered["status"] == 0
    # What it could not finish it has left to be finished, and nothing else.
    assert bool(recovered["guests"]) == (point == "before x-sev-adopt-finish 0")
    note(fault_table, guest, point, fault, "source" if status else "destination")
