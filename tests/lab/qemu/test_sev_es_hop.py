"""SEV-ES guests hop, and run on: what is not in the VMSA of their vCPUs arrives as well."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from sevhop.errors import RolledBack
from sevhop.report import Report

from tests.support.guests import emulators, es_counter
from tests.support.guests.machine import Machine
from tests.support.guests.running import Guest

from ...qemu.hops import HopDriver, kill_destination
from ..contract.sev import POLICY_SEV_ES

#: Seconds for a step; everything is slow in the lab.
PATIENCE = 60.0
#: Starts a counting SEV-ES guest in a QEMU, with so many vCPUs.
StartEs = Callable[..., Guest]


@pytest.fixture
def start_es(tmp_path: Path) -> Iterator[StartEs]:
    sev = f"sev-guest,id=sev,cbitpos={es_counter.C_BIT},reduced-phys-bits=1,policy={POLICY_SEV_ES | 1}"
    with ExitStack() as guests:

        def start(label: str, cpus: int = 1) -> Guest:
            machine = Machine(
                tmp_path / "guest",
                accelerator="kvm",
                # A model by name: with "host" a newer QEMU gives the guest more, and to go back would be a loss.
                cpu="EPYC",
                cpus=cpus,
                memory_mib=32,
                bios=es_counter.firmware(),
                more=("-object", sev, "-machine", "confidential-guest-support=sev"),
            )
            guest = guests.enter_context(Guest.start(machine, emulators.emulator(label)))
            guest.wait_for_ticks(5)
            return guest

        yield start


def hop(guest: Guest, label: str, **options: object) -> Report:
    """Hop a guest, with time enough."""
    emulator = emulators.emulator(label)
    return HopDriver().run(guest, emulator, timeout=PATIENCE, start_timeout=120, **options)  # type: ignore[arg-type]


def policy_of(guest: Guest) -> tuple[str, int]:
    sev = guest.execute("query-sev")
    return sev["state"], sev["policy"]


@pytest.mark.parametrize("cpus", [1, 2])
@pytest.mark.parametrize("first", [emulators.OLD, emulators.NEW])
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


def test_sev_es_guest_survives_destination_killed_after_commit(start_es: StartEs) -> None:
    """Its context is in the VM of that one, and goes to a third QEMU."""
    guest = start_es(emulators.NEW)
    report = hop(guest, emulators.NEW, at="resume", fault=kill_destination)
    assert report.outcome == "done"
    assert any("retrying in another process" in note for note in report.notes)
    guest.wait_for_ticks(5)
    assert guest.stop().unharmed
