"""
Upgrades that are broken off at every step, and what ``sevhop recover`` makes of them.

After each the guest is counted: it goes on, under its name, in one QEMU, and has lost nothing.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from faults import broken_upgrade
from faults.broken_upgrade import HELD, IN_THE_SOURCE, RUNNING
from faults.table import Cell, FaultTable
from guests.daemon import Daemon, DomainGuest

from ..conftest import some_of
from .conftest import StartDomain

PATH = "A domain of libvirt: `sevhop upgrade`"
END = {"source": "old", "destination": "new"}
COLUMNS = {
    "command": "command killed",
    "source": "source killed",
    "keeper": "keeper killed",
    "daemon": "libvirtd killed",
    "error": "step refused",
    "silence": "no answer",
}
_TOOLS = Path(broken_upgrade.__file__).parents[1]


def break_off(daemon: Daemon, guest: DomainGuest, emulator: Path, point: str, fault: str) -> int:
    """Upgrade with a fault; the exit status."""
    program = ["env", f"PYTHONPATH={_TOOLS}", sys.executable, "-m", broken_upgrade.__name__]
    return daemon.run(*program, guest.name, emulator, point, fault).returncode


def recover(daemon: Daemon) -> dict[str, Any]:
    """Run ``sevhop recover``; what it says, and its exit status."""
    done = daemon.sevhop("recover", "--json")
    assert done.stderr == "", done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer | {"status": done.returncode}


def note(table: FaultTable, daemon: Daemon, guest: DomainGuest, point: str, fault: str, old: Path) -> None:
    """See that the guest runs and lost nothing, that nothing is left, and write that down."""
    assert guest.state == "running"
    verdict = guest.wait_for_ticks()
    end = "source" if guest.emulator() == str(old) else "destination"
    table.add(PATH, point, COLUMNS[fault], Cell(f"{END[end]} QEMU", verdict.ticks_lost, verdict.ticks_repeated))
    assert guest.emulator("--inactive") == guest.emulator()
    assert daemon.left_over() == []


@pytest.fixture
def guest(start: StartDomain) -> DomainGuest:
    """A counting guest in the older QEMU."""
    guest = start()
    guest.wait_for_ticks(3)
    return guest


@pytest.mark.parametrize("point", some_of(IN_THE_SOURCE) + some_of((*HELD, *RUNNING)))
def test_the_command_is_killed(
    point: str, daemon: Daemon, guest: DomainGuest, old: Path, new: Path, fault_table: FaultTable
) -> None:
    assert break_off(daemon, guest, new, point, "command") in (-signal.SIGKILL, 128 + signal.SIGKILL)
    answer = recover(daemon)
    assert answer["status"] == 0, answer
    (one,) = answer["guests"]
    assert one["end"] == ("source" if point in IN_THE_SOURCE else "destination")
    note(fault_table, daemon, guest, point, "command", old)
    assert recover(daemon) == {"guests": [], "status": 0}


@pytest.mark.parametrize("fault", ["daemon", "error", "silence"])
@pytest.mark.parametrize(
    "point", some_of([point for point in (*IN_THE_SOURCE, *HELD, *RUNNING) if "before" in point])
)
def test_a_step_fails(
    point: str, fault: str, daemon: Daemon, guest: DomainGuest, old: Path, new: Path, fault_table: FaultTable
) -> None:
    status = break_off(daemon, guest, new, point, fault)
    if fault == "daemon":
        daemon.wait_until_it_answers()
    assert status in (0, 3, 4)
    answer = recover(daemon)
    assert answer["status"] == 0, answer
    assert status == 4 or not answer["guests"]
    note(fault_table, daemon, guest, point, fault, old)


@pytest.mark.parametrize("point", some_of((*HELD, *RUNNING)))
def test_the_source_is_killed(
    point: str, daemon: Daemon, guest: DomainGuest, old: Path, new: Path, fault_table: FaultTable
) -> None:
    """Once its state is saved it is not needed any more."""
    assert break_off(daemon, guest, new, point, "source") == 0
    note(fault_table, daemon, guest, point, "source", old)


@pytest.mark.parametrize("point", some_of((*IN_THE_SOURCE[1:], *HELD, *RUNNING[:-1])))
def test_the_keeper_is_killed(
    point: str, daemon: Daemon, guest: DomainGuest, old: Path, new: Path, fault_table: FaultTable
) -> None:
    """Its guardian starts the next one, and nobody notices."""
    assert break_off(daemon, guest, new, point, "keeper") == 0
    note(fault_table, daemon, guest, point, "keeper", old)
