"""
Hops of SEV guests that are interrupted around the commit, and what becomes of the guest and its context.

Before the move the context is the source's, after it the destination's; a descriptor of that VM is enough to move it.
All but two run only with the marker ``faults``: each takes half a minute in emulation.
"""

from __future__ import annotations

import signal
from typing import Any

import pytest

from tests.support.guests import emulators
from tests.support.guests.life import lived_in
from tests.support.guests.running import Guest

from ...conftest import NoteFault
from ...qemu.interrupted import interrupt_hop, note, recover
from ...qemu.lived import LivedInGuest
from ..contract.sev import contexts
from .conftest import DescribeSev, StartGuest

#: What a hop does in which order does not depend on the kernel.
pytestmark = pytest.mark.one_kernel("6.12")

PATH = "An SEV guest outside libvirt, in the lab"
BEFORE = ("phase load", "phase commit", "before x-sev-migrate-from 0")
BEHIND = ("after x-sev-migrate-from 0", "phase resume", "before cont 0")
RUNNING = ("after cont 0", "phase finish", "before end-source 0")


def right_behind_the_move(*points: str) -> list[Any]:
    """The point at which most is at stake; the others run when they are asked for by their marker."""
    return [pytest.param(point, marks=[] if point == BEHIND[0] else pytest.mark.faults) for point in points]


@pytest.fixture
def guest(sev_machine: DescribeSev, start: StartGuest) -> Guest:
    """A counting SEV guest, that has lived."""
    guest = start(lived_in(sev_machine()))
    guest.wait_for_ticks(3)
    return LivedInGuest.of(guest)


def end_of(guest: Guest, note_fault: NoteFault, point: str, fault: str, end: str) -> None:
    """Verify that the guest runs there, with its context."""
    note(note_fault, PATH, guest, point, fault, end)
    (context,) = contexts()
    sev = guest.execute("query-sev")
    assert (sev["state"], sev["handle"]) == ("running", context.handle)


@pytest.mark.parametrize("point", right_behind_the_move(*BEFORE, *BEHIND, *RUNNING))
def test_guest_survives_command_killed(guest: Guest, point: str, note_fault: NoteFault) -> None:
    assert interrupt_hop(guest, emulators.emulator(emulators.NEW), point, "command") == -signal.SIGKILL
    answer = recover()
    assert answer["status"] == 0, answer
    (one,) = answer["guests"]
    assert one["result"] == ("source" if point in BEFORE else "destination")
    end_of(guest, note_fault, point, "command", one["result"])


@pytest.mark.faults
@pytest.mark.parametrize("point", (*BEFORE, *BEHIND, *RUNNING))
def test_guest_survives_source_killed(guest: Guest, point: str, note_fault: NoteFault) -> None:
    """The context is in its VM, which the command holds."""
    assert interrupt_hop(guest, emulators.emulator(emulators.NEW), point, "source") == 0
    assert recover() == {"guests": [], "status": 0}
    end_of(guest, note_fault, point, "source", "destination")


@pytest.mark.parametrize("point", right_behind_the_move(*BEFORE, *BEHIND))
def test_guest_survives_destination_killed(guest: Guest, point: str, note_fault: NoteFault) -> None:
    """
    Behind the move the context is in its VM, which the command holds as well: another QEMU gets it. So it is with one
    that ends when it is asked for the move, since nobody knows whether it has done that.
    """
    before = point in BEFORE[:-1]
    assert interrupt_hop(guest, emulators.emulator(emulators.NEW), point, "destination") == (3 if before else 0)
    assert recover() == {"guests": [], "status": 0}
    end_of(guest, note_fault, point, "destination", "source" if before else "destination")
