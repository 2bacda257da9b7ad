"""
A reset after a hop boots the firmware that was encrypted at launch, if its pages are shared; in any other pages it is
garbage. Elsewhere in the lab a copy of the firmware would boot as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from sevhop.guest import reboot

from tests.support.guests import emulators
from tests.support.guests.running import Guest, GuestFailed, wait_until

from ...qemu.hops import HopDriver
from ..qemu.conftest import DescribeSev, sev_machine

__all__ = ["sev_machine"]

#: Seconds for a step; everything is slow in the lab, and slower with encryption.
PATIENCE = 240.0


@pytest.fixture
def guests() -> Iterator[ExitStack]:
    """Guests that end with the test."""
    with ExitStack() as started:
        yield started


@pytest.mark.parametrize("shared", [True, False])
def test_guest_boots_after_a_hop_only_if_its_firmware_is_shared(
    shared: bool, sev_machine: DescribeSev, guests: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing prevents the reset here: that would be a shutdown otherwise."""
    monkeypatch.setattr(reboot, "stops", lambda guest: False)
    emulator = emulators.emulator(emulators.NEW)
    more = ("-machine", f"aux-ram-share={'on' if shared else 'off'}")
    guest = guests.enter_context(Guest.start(sev_machine(policy=1, more=more), emulator))
    guest.wait_for_ticks(3, PATIENCE)
    guest.execute("system_reset")
    wait_until(lambda: guest.seen().restarts == 1, PATIENCE, "the guest starts again before its hop")
    guest.wait_for_ticks(3, PATIENCE)
    HopDriver().run(guest, emulator, timeout=PATIENCE, start_timeout=PATIENCE)
    guest.wait_for_ticks(3, PATIENCE)
    guest.execute("system_reset")
    if shared:
        wait_until(lambda: guest.seen().restarts == 2, PATIENCE, "the guest starts again after its hop")
        guest.wait_for_ticks(3, PATIENCE)
        return
    with pytest.raises(GuestFailed, match="the guest executes garbage"):
        wait_until(lambda: guest.seen().restarts == 2, 60, "the guest executes garbage")
