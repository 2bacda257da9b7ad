"""SEV guests reboot after a hop, or are shut down instead: that depends on where their firmware is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
from sevhop.report import Report

from tests.support.guests import emulators, es_counter
from tests.support.guests.machine import Machine
from tests.support.guests.running import Guest, wait_ended, wait_until

from ...qemu.hops import HopDriver
from ..contract.sev import POLICY_SEV_ES
from .conftest import DescribeSev

#: Seconds for a step; everything is slow in the lab.
PATIENCE = 300.0
#: Of QEMUs that can share firmware.
LABELS = [emulators.NEW, pytest.param(emulators.UNSTABLE, marks=pytest.mark.long)]


@pytest.fixture
def guests() -> Iterator[ExitStack]:
    """Guests that end with the test."""
    with ExitStack() as started:
        yield started


def hop(guest: Guest, label: str) -> Report:
    """Hop a guest, with time enough."""
    return HopDriver().run(guest, emulators.emulator(label), timeout=PATIENCE, start_timeout=PATIENCE)


def has_restarted(guest: Guest, times: int) -> bool:
    """Whether it has booted so often after its start."""
    return guest.seen().restarts == times


@pytest.mark.one_kernel("6.12")
@pytest.mark.parametrize("label", LABELS)
def test_sev_guest_with_shared_firmware_reboots_after_hops(
    label: str, sev_machine: DescribeSev, guests: ExitStack
) -> None:
    """Each time it boots the firmware that was encrypted in the first QEMU, and counts from the start."""
    machine = sev_machine(policy=1, more=("-machine", "aux-ram-share=on"))
    guest = guests.enter_context(Guest.start(machine, emulators.emulator(emulators.NEW)))
    guest.wait_for_ticks(5)
    for restarts, there in enumerate((label, emulators.NEW), start=1):
        assert hop(guest, there).notes == []
        guest.wait_for_ticks(5)
        pid = guest.pid
        guest.execute("system_reset")
        wait_until(partial(has_restarted, guest, restarts), PATIENCE, "the guest starts again")
        guest.wait_for_ticks(5)
        assert guest.pid == pid
    verdict = guest.stop()
    assert (verdict.restarts, verdict.ticks_lost, verdict.ticks_repeated, verdict.memory_errors) == (2, 0, 0, 0)


def shut_down_at_reset(guest: Guest) -> None:
    """Its QEMU exits when it is to be reset, whatever a client has set."""
    ticks, pid = guest.seen().ticks, guest.pid
    guest.execute("set-action", reboot="reset")
    guest.execute("system_reset")
    assert wait_ended(pid, PATIENCE)
    verdict = guest.seen()
    assert verdict.restarts == 0
    assert verdict.ticks >= ticks


@pytest.mark.one_kernel("6.1")
def test_sev_guest_with_private_firmware_shuts_down_at_a_reboot(sev_machine: DescribeSev, guests: ExitStack) -> None:
    guest = guests.enter_context(Guest.start(sev_machine(policy=1), emulators.emulator(emulators.NEW)))
    guest.wait_for_ticks(5)
    hop(guest, emulators.NEW)
    guest.wait_for_ticks(5)
    shut_down_at_reset(guest)


@pytest.mark.one_kernel("6.1")
@pytest.mark.parametrize("label", LABELS)
def test_sev_es_guest_shuts_down_at_a_reboot(label: str, guests: ExitStack, tmp_path: Path) -> None:
    """Also in a QEMU that launches such a guest again if it has launched it before."""
    machine = Machine(
        tmp_path / "guest",
        accelerator="kvm",
        cpu="EPYC",
        memory_mib=32,
        bios=es_counter.firmware(),
        sev_policy=POLICY_SEV_ES | 1,
        more=("-machine", "aux-ram-share=on"),
    )
    guest = guests.enter_context(Guest.start(machine, emulators.emulator(label)))
    guest.wait_for_ticks(5)
    hop(guest, label)
    guest.wait_for_ticks(5)
    shut_down_at_reset(guest)
