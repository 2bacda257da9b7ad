"""SEV-ES guests hop, and run on: what is not in the VMSA of their vCPUs arrives as well."""

from __future__ import annotations

import pytest
from sevhop.errors import RolledBack
from sevhop.report import Report

from tests.support.guests import emulators
from tests.support.guests.running import Guest

from ...qemu.hops import HopDriver, kill_destination
from ..contract.sev import POLICY_SEV_ES
from .conftest import StartEs

#: Seconds for a step; everything is slow in the lab.
PATIENCE = 60.0


def hop(guest: Guest, label: str, **options: object) -> Report:
    """Hop a guest, with time enough."""
    emulator = emulators.emulator(label)
    return HopDriver().run(guest, emulator, timeout=PATIENCE, start_timeout=120, **options)  # type: ignore[arg-type]


def policy_of(guest: Guest) -> tuple[str, int]:
    sev = guest.execute("query-sev")
    return sev["state"], sev["policy"]


@pytest.mark.parametrize(
    ("first", "cpus"),
    [
        (emulators.OLD, 1),
        (emulators.NEW, 2),
        pytest.param(emulators.OLD, 2, marks=pytest.mark.long),
        pytest.param(emulators.NEW, 1, marks=pytest.mark.long),
    ],
)
def test_sev_es_guest_hops_to_and_fro(first: str, cpus: int, start_es: StartEs) -> None:
    """It is halted most of the time, and only its local APIC wakes it; the second vCPU was never started."""
    guest = start_es(first, cpus)
    for label in (emulators.NEW, emulators.OLD, emulators.OLD, emulators.NEW, emulators.NEW):
        report = hop(guest, label)
        assert (report.outcome, report.context) == ("done", "sev-es")
        assert report.move is not None
        assert report.move.errno == 0
        guest.wait_for_ticks(5)
        assert policy_of(guest) == ("running", POLICY_SEV_ES | 1)
    verdict = guest.stop()
    assert verdict.unharmed, verdict


@pytest.mark.one_kernel("6.1")
@pytest.mark.parametrize("label", [emulators.OLD, emulators.NEW])
def test_sev_es_guest_runs_on_after_a_rollback(label: str, start_es: StartEs) -> None:
    """Also one whose QEMU had begun to access its vCPUs; and it can hop afterwards."""
    guest = start_es(label)
    pid = guest.pid
    with pytest.raises(RolledBack, match="the new QEMU exited"):
        hop(guest, emulators.NEW, at="commit", fault=kill_destination)
    assert guest.pid == pid
    guest.wait_for_ticks(5)
    assert hop(guest, emulators.NEW).outcome == "done"
    guest.wait_for_ticks(5)
    assert guest.stop().unharmed


@pytest.mark.one_kernel("6.12")
def test_sev_es_guest_survives_destination_killed_after_commit(start_es: StartEs) -> None:
    """Its context is in the VM of that one, and goes to a third QEMU."""
    guest = start_es(emulators.NEW)
    report = hop(guest, emulators.NEW, at="resume", fault=kill_destination)
    assert report.outcome == "done"
    assert any("retrying in another process" in note for note in report.notes)
    guest.wait_for_ticks(5)
    assert guest.stop().unharmed
