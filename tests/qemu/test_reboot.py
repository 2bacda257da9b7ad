"""Guests that are reset after a hop."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from sevhop.guest import reboot
from sevhop.guest.inspection import SevContext, inspect
from sevhop_qmp.process import QemuProcess

from tests.support.guests.running import Guest, wait_ended, wait_until

from .adopting import TIMEOUT
from .conftest import DescribeCounter, StartGuest
from .hops import hop


def could_be_reset(guest: Guest) -> bool:
    """Whether a guest with these RAM blocks could be reset after a hop if it was an SEV guest."""

    async def examine() -> bool:
        async with await guest.monitor() as monitor:
            process = QemuProcess.open(monitor.peer)
            try:
                found = await inspect(monitor, process)
            finally:
                process.close()
        return not reboot.stops(found._replace(context=SevContext("sev")))

    return asyncio.run(examine())


@pytest.mark.parametrize("uefi", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_plain_guest_reboots_wherever_its_firmware_is(
    shared: bool, uefi: bool, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    """And the firmware is in shared memory in each QEMU, or in none."""
    more = ("-machine", f"aux-ram-share={'on' if shared else 'off'}")
    guest = start(counter_machine(uefi=uefi, more=more), new)
    for restarts in (1, 2):
        guest.wait_for_ticks(5)
        assert could_be_reset(guest) is shared
        hop(guest, new)
        guest.execute("system_reset")
        wait_until(lambda n=restarts: guest.seen().restarts == n, TIMEOUT, "the guest starts again")  # type: ignore[misc]
    guest.wait_for_ticks(5)
    assert could_be_reset(guest) is shared


@pytest.mark.parametrize("stops", [True, False])
def test_client_sets_no_reset_if_the_guest_cannot_be_reset(
    stops: bool, new: Path, counter_machine: DescribeCounter, start: StartGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here sevhop takes a plain guest for one that cannot."""
    monkeypatch.setattr(reboot, "stops", lambda guest: stops)
    guest = start(counter_machine(), new)
    guest.wait_for_ticks(5)
    hop(guest, new)
    pid = guest.pid
    guest.execute("set-action", reboot="reset")
    guest.execute("system_reset")
    if stops:
        assert wait_ended(pid, TIMEOUT)
        assert guest.seen().restarts == 0
    else:
        wait_until(lambda: guest.seen().restarts == 1, TIMEOUT, "the guest starts again")
