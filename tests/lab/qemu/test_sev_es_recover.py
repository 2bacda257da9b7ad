"""
Hops of SEV-ES guests that are interrupted around the commit: where the guest and its context end, and that all of its
vCPU state is accessible to QEMU again, or not, as without a hop.

All but three run only with the marker ``faults``. More steps, with the kernel's part played: tests/qemu.
"""

from __future__ import annotations

import signal
from typing import Any

import pytest

from tests.support.guests import emulators
from tests.support.guests.running import Guest

from ...conftest import NoteFault
from ...qemu.interrupted import interrupt_hop, note, recover
from ...qemu.protected import assert_can_hop_again
from ..contract.sev import POLICY_SEV_ES, contexts
from .conftest import StartEs

#: What a hop does in which order does not depend on the kernel.
pytestmark = pytest.mark.one_kernel("6.12")

PATH = "An SEV-ES guest outside libvirt, in the lab"
#: The last one is not known to the command: it is about to ask for the move, or has.
BEFORE = ("phase save", "phase load", "after halt 0", "phase commit", "before x-sev-migrate-from 0")
BEHIND = ("after x-sev-migrate-from 0", "phase resume", "before cont 0")
RUNNING = ("after cont 0", "phase finish", "before end-source 0", "before x-sev-adopt-finish 0")


def chosen(*points: str) -> list[Any]:
    """At both sides of the move; the others run when they are asked for by their marker."""
    rest = pytest.mark.faults
    return [pytest.param(point, marks=[] if point in (BEFORE[-1], BEHIND[0]) else rest) for point in points]


@pytest.fixture
def guest(start_es: StartEs) -> Guest:
    """A counting SEV-ES guest, whose QEMU leaves its vCPU state alone."""
    return start_es(emulators.NEW)


def interrupt(guest: Guest, point: str, fault: str) -> int:
    """Hop to the same version; the exit status."""
    return interrupt_hop(guest, emulators.emulator(emulators.NEW), point, fault)


def see_end(note_fault: NoteFault, guest: Guest, point: str, fault: str, end: str, remark: str = "") -> None:
    """Verify that the guest runs there, with its context, and can hop again."""
    note(note_fault, PATH, guest, point, fault, end, remark)
    (context,) = contexts()
    sev = guest.execute("query-sev")
    assert (sev["state"], sev["policy"], sev["handle"]) == ("running", POLICY_SEV_ES | 1, context.handle)
    assert assert_can_hop_again(guest.machine.monitor)


@pytest.mark.parametrize("point", chosen(*BEFORE, *BEHIND, *RUNNING))
def test_sev_es_guest_survives_command_killed(guest: Guest, point: str, note_fault: NoteFault) -> None:
    assert interrupt(guest, point, "command") == -signal.SIGKILL
    answer = recover()
    assert answer["status"] == 0, answer
    (one,) = answer["guests"]
    assert one["result"] == ("source" if point in BEFORE else "destination")
    see_end(note_fault, guest, point, "command", one["result"])


@pytest.mark.faults
@pytest.mark.parametrize("point", (*BEFORE[1:], *BEHIND, *RUNNING))
def test_sev_es_guest_survives_source_killed(guest: Guest, point: str, note_fault: NoteFault) -> None:
    """The context is in its VM, which the command holds."""
    assert interrupt(guest, point, "source") == 0
    assert recover() == {"guests": [], "status": 0}
    see_end(note_fault, guest, point, "source", "destination")


@pytest.mark.parametrize("point", chosen(*BEFORE, *BEHIND))
def test_sev_es_guest_survives_destination_killed(guest: Guest, point: str, note_fault: NoteFault) -> None:
    """It is rolled back, unless the move was done, or may have been: then another QEMU gets the context."""
    before = point in BEFORE[:-1]
    assert interrupt(guest, point, "destination") == (3 if before else 0)
    assert recover() == {"guests": [], "status": 0}
    see_end(note_fault, guest, point, "destination", *(["source"] if before else ["destination", "another one"]))


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["error", "silence"])
@pytest.mark.parametrize("point", (BEFORE[-1], BEHIND[-1]))
def test_sev_es_guest_survives_move_or_cont_refused(
    guest: Guest, point: str, fault: str, note_fault: NoteFault
) -> None:
    unanswered = fault == "silence"
    rolled_back = point == BEFORE[-1] and not unanswered
    assert interrupt(guest, point, fault) == (3 if rolled_back else 0)
    assert recover() == {"guests": [], "status": 0}
    end = "source" if rolled_back else "destination"
    see_end(note_fault, guest, point, fault, end, "another one" if unanswered else "")
