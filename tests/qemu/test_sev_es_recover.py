"""
Hops of SEV-ES guests that are interrupted from the stop on, and the result of ``sevhop recover``.

The kernel's part is played, see ``fake_sev_kernel.c``: nothing makes the source unable to run after the move. The lab
has the same with the real one. In the source the flag ``guest_state_protected`` is cleared right before the stop;
wherever the guest ends, its QEMU must have it set.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import Any, NoReturn

import pytest
from sevhop.engine import commit
from sevhop.errors import GuestState, RecoveryRequired
from sevhop_qmp import adopt
from sevhop_qmp.errors import MonitorTimeout, StateError
from sevhop_qmp.process import QemuProcess
from sevhop_qmp.protected_state import ProtectedState

from tests.support.faults.table import Cell
from tests.support.guests import emulators
from tests.support.guests.running import Guest, processes_of

from ..conftest import NoteFault
from .conftest import StartEs
from .hops import HopDriver, assert_unharmed
from .interrupted import interrupt_hop, note, recover
from .protected import BROKEN_HOP, assert_can_hop_again, reboot_action_of

PATH = "An SEV-ES guest outside libvirt"

#: The source has the guest, which runs, and the flag is set: only what it does at a reboot is changed.
PREPARING = ("before set-action 0", "after set-action 0")
#: The source has all of the guest.
STOPPING = ("before stop 0", "before xen-save-devices-state 0")
#: It is a matter of a millisecond whether all of its state was read.
BEING_SAVED = ("after stop 0", "phase map", "phase save")
#: Its state has been saved, the context is the source's. Who asked for the move does not know that if it fails there.
SAVED = (
    *("phase load", "before halt 0", "after halt 0", "before stream-end 0", "after stream-end 0", "phase commit"),
    "before x-sev-migrate-from 0",
)
STOPPED = (*STOPPING, *BEING_SAVED, *SAVED)
IN_THE_SOURCE = (*PREPARING, *STOPPED)
#: The context is the destination's, where the guest has not run.
MOVED = ("after x-sev-migrate-from 0", "phase resume", "before cont 0")
RUNNING = (
    *("after cont 0", "phase finish", "before end-source 0", "after end-source 0"),
    *("before x-sev-adopt-finish 0", "after x-sev-adopt-finish 0"),
)
ALL = (*IN_THE_SOURCE, *MOVED, *RUNNING)
#: What may be refused, or not answered.
COMMANDS = [point for point in ALL if point.startswith("before ")]
#: In these the hop is completed although one is.
COMPLETED = ("before cont 0", "before end-source 0", "before x-sev-adopt-finish 0")
#: At both sides of the commit.
MOVING = ("before x-sev-migrate-from 0", "after x-sev-migrate-from 0")


def chosen(points: Sequence[str], *default: str) -> list[Any]:
    """The points, of which all but some run only if they are asked for by their marker."""
    rest = [pytest.mark.faults]
    return [pytest.param(point, marks=[] if point in default else rest) for point in points]


@pytest.fixture
def guest(start_es: StartEs) -> Guest:
    """A counting SEV-ES guest in a QEMU that has the flag."""
    return start_es(emulators.NEW)


@pytest.fixture
def offset(guest: Guest) -> int:
    """Of the flag, in the QEMU of this version."""
    offset = assert_can_hop_again(guest.machine.monitor)
    assert offset
    return offset


def interrupt(guest: Guest, point: str, fault: str) -> int:
    """Hop to the same version; the exit status."""
    return interrupt_hop(guest, emulators.emulator(emulators.NEW), point, fault, program=("-c", BROKEN_HOP))


def flag_of(pid: int, offset: int) -> int:
    """The flag of a QEMU that need not answer."""
    process = QemuProcess.open(pid)
    try:
        with ProtectedState(process, offset) as flag:
            return flag.protected()
    finally:
        process.close()


def see_end(note_fault: NoteFault, guest: Guest, point: str, fault: str, end: str, remark: str = "") -> None:
    """Verify that the guest runs there and has lost nothing, and that its QEMU is what it would be without a hop."""
    note(note_fault, PATH, guest, point, fault, end, remark)
    assert assert_can_hop_again(guest.machine.monitor)


def see_lost(note_fault: NoteFault, guest: Guest, point: str, fault: str) -> None:
    """Its only QEMU was killed: it may not run in the other one."""
    assert processes_of(guest.machine.directory) == []
    note_fault(PATH, point, fault, Cell("*ended with its QEMU*", 0, 0))


@pytest.mark.parametrize(
    "point", chosen(ALL, PREPARING[1], "after stop 0", "after halt 0", *MOVING, "before x-sev-adopt-finish 0")
)
def test_sev_es_guest_survives_command_killed(point: str, guest: Guest, offset: int, note_fault: NoteFault) -> None:
    source = guest.pid
    assert interrupt(guest, point, "command") == -signal.SIGKILL
    if point in (*IN_THE_SOURCE, *MOVED):
        assert flag_of(source, offset) == (1 if point in PREPARING else 0), "so there is something to be set again"
        assert reboot_action_of(source) == ("reset" if point == PREPARING[0] else "shutdown")
    answer = recover()
    assert answer["status"] == 0, answer
    (one,) = answer["guests"]
    assert (one["result"], one["detail"]) == ("source" if point in IN_THE_SOURCE else "destination", "")
    assert (guest.pid == source) == (one["result"] == "source")
    assert reboot_action_of(guest.pid) == ("reset" if guest.pid == source else "shutdown")
    see_end(note_fault, guest, point, "command", one["result"])
    assert HopDriver().run(guest, emulators.emulator(emulators.NEW)).outcome == "done"
    assert_unharmed(guest)


@pytest.mark.faults
@pytest.mark.parametrize("point", (*PREPARING, *STOPPING))
def test_sev_es_guest_is_lost_with_source_killed_before_save(point: str, guest: Guest, note_fault: NoteFault) -> None:
    assert interrupt(guest, point, "source") == 5
    assert recover() == {"guests": [], "status": 0}
    see_lost(note_fault, guest, point, "source")


@pytest.mark.faults
@pytest.mark.parametrize("point", BEING_SAVED)
def test_partly_saved_sev_es_guest_never_runs_if_source_killed(point: str, guest: Guest, note_fault: NoteFault) -> None:
    status = interrupt(guest, point, "source")
    assert recover() == {"guests": [], "status": 0}
    if status == 0:
        see_end(note_fault, guest, point, "source", "destination")
    else:
        see_lost(note_fault, guest, point, "source")


@pytest.mark.parametrize("point", chosen((*SAVED, *MOVED, *RUNNING), MOVING[1]))
def test_sev_es_guest_survives_source_killed_after_save(point: str, guest: Guest, note_fault: NoteFault) -> None:
    """The context is in its VM, which the command holds."""
    assert interrupt(guest, point, "source") == 0
    assert recover() == {"guests": [], "status": 0}
    see_end(note_fault, guest, point, "source", "destination")


@pytest.mark.parametrize("point", chosen((*STOPPED, *MOVED), "after halt 0", *MOVING))
def test_sev_es_guest_survives_destination_killed(point: str, guest: Guest, offset: int, note_fault: NoteFault) -> None:
    """It is rolled back, unless the move was done, or may have been: then another QEMU gets the guest."""
    source = guest.pid
    before = point in IN_THE_SOURCE[:-1]
    assert interrupt(guest, point, "destination") == (3 if before else 0)
    if before:
        assert flag_of(source, offset) == 1
    assert recover() == {"guests": [], "status": 0}
    assert (guest.pid == source) == before
    see_end(note_fault, guest, point, "destination", *(("source",) if before else ("destination", "another one")))


@pytest.mark.faults
@pytest.mark.parametrize("point", RUNNING)
def test_sev_es_guest_is_lost_with_destination_that_runs_it(point: str, guest: Guest, note_fault: NoteFault) -> None:
    interrupt(guest, point, "destination")
    assert recover()["status"] in (0, 5)
    see_lost(note_fault, guest, point, "destination")


@pytest.mark.parametrize("fault", ["error", "silence"])
@pytest.mark.parametrize("point", chosen(COMMANDS, MOVING[0]))
def test_sev_es_guest_survives_qemu_error_or_silence(
    point: str, fault: str, guest: Guest, note_fault: NoteFault
) -> None:
    source = guest.pid
    unanswered = fault == "silence" and point in ("before x-sev-migrate-from 0", "before cont 0")
    rolled_back = not unanswered and point not in COMPLETED
    assert interrupt(guest, point, fault) == (3 if rolled_back else 0)
    recovered = recover()
    assert recovered["status"] == 0
    assert bool(recovered["guests"]) == (point == "before x-sev-adopt-finish 0")
    assert (guest.pid == source) == rolled_back
    end = "source" if rolled_back else "destination"
    see_end(note_fault, guest, point, fault, end, "another one" if unanswered else "")


@pytest.mark.parametrize("point", chosen((*STOPPED, *MOVED), STOPPING[0]))
def test_sev_es_guest_survives_source_that_hangs(point: str, guest: Guest, note_fault: NoteFault) -> None:
    """Until it has saved its state the hop waits for it, and is rolled back. Then it need not answer any more."""
    source = guest.pid
    status = interrupt(guest, point, "stall")
    assert recover() == {"guests": [], "status": 0}
    if point in BEING_SAVED:
        assert status in (0, 3)
    else:
        assert status == (3 if point in STOPPING else 0)
    assert (guest.pid == source) == (status == 3)
    see_end(note_fault, guest, point, "stall", "source" if status else "destination")


def test_flag_is_set_again_in_a_source_that_another_client_has_resumed(guest: Guest, offset: int) -> None:
    source = guest.pid
    assert interrupt(guest, "phase map", "command") == -signal.SIGKILL
    guest.execute("cont")
    guest.wait_for_ticks(3)
    assert flag_of(source, offset) == 0
    assert recover()["guests"][0]["result"] == "source"
    assert flag_of(source, offset) == 1
    assert_unharmed(guest)


@pytest.mark.parametrize(("fault", "status"), [("command", -signal.SIGKILL), ("destination", 3)])
def test_flag_is_set_again_in_a_paused_source(fault: str, status: int, guest: Guest, offset: int) -> None:
    guest.execute("stop")
    assert interrupt(guest, "phase commit", fault) == status
    assert [one["result"] for one in recover()["guests"]] == (["source"] if fault == "command" else [])
    assert guest.execute("query-status")["status"] == "paused"
    assert flag_of(guest.pid, offset) == 1
    guest.execute("cont")
    assert_unharmed(guest)


def test_flag_is_set_again_if_the_move_got_no_answer_and_no_other_qemu_starts(
    guest: Guest, offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command cannot know who has the context, so it is recover that finds it in the source."""

    async def unanswered(*_: object) -> NoReturn:
        raise MonitorTimeout("QEMU did not answer, for a test")

    async def unavailable(*_: object) -> NoReturn:
        raise StateError("no other QEMU, for a test")

    monkeypatch.setattr(adopt, "move_from", unanswered)
    monkeypatch.setattr(commit, "start_destination", unavailable)
    source = guest.pid
    with pytest.raises(RecoveryRequired, match="another new QEMU failed as well") as caught:
        HopDriver().run(guest, emulators.emulator(emulators.NEW))
    assert caught.value.guest_state is GuestState.UNKNOWN
    assert flag_of(source, offset) == 0
    (one,) = recover()["guests"]
    assert (one["result"], guest.pid) == ("source", source)
    assert flag_of(source, offset) == 1
    assert_unharmed(guest)
