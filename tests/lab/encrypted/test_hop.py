"""
Hops of SEV guests whose memory is encrypted under the place of each page: what is not the page itself is garbage there.
"""

from __future__ import annotations

import itertools

import pytest

from tests.support.guests import emulators

from ...qemu.hops import HopDriver
from ..contract.sev import contexts
from ..qemu.conftest import DescribeSev, StartGuest, sev_machine, start

__all__ = ["sev_machine", "start"]

#: Seconds for a step; encryption makes it slower still.
PATIENCE = 120.0


@pytest.mark.parametrize("hops", [2, pytest.param(10, marks=pytest.mark.long)])
def test_guest_counts_on_after_each_hop(sev_machine: DescribeSev, start: StartGuest, hops: int) -> None:
    guest = start(sev_machine())
    guest.wait_for_ticks(3)
    (context,) = contexts()
    for label in itertools.islice(itertools.cycle((emulators.NEW, emulators.OLD)), hops):
        report = HopDriver().run(guest, emulators.emulator(label), timeout=PATIENCE, start_timeout=PATIENCE)
        assert report.outcome == "done"
        assert report.destination_version.startswith(label)
        guest.wait_for_ticks(3)
        assert contexts() == [context]
    verdict = guest.stop()
    assert verdict.unharmed, verdict
