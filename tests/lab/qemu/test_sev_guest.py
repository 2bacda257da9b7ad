"""Stock QEMU launches SEV guests in the lab: the ground that hops of them stand on."""

from __future__ import annotations

from ..contract.sev import POLICY_SEV_ES, contexts
from .conftest import DescribeSev, StartGuest

FIRST_SEV_ASID = 100
FIRMWARE_BYTES = 0x10000


def test_sev_guest_runs(sev_machine: DescribeSev, start: StartGuest) -> None:
    guest = start(sev_machine())
    guest.wait_for_ticks(20)
    (context,) = contexts()
    assert context.asid >= FIRST_SEV_ASID
    assert context.bytes == FIRMWARE_BYTES
    sev = guest.execute("query-sev")
    assert (sev["enabled"], sev["state"], sev["policy"]) == (True, "running", 0)
    assert sev["handle"] == context.handle
    assert guest.stop().unharmed


def test_qemu_refuses_to_migrate_sev_guest(sev_machine: DescribeSev, start: StartGuest) -> None:
    guest = start(sev_machine())
    assert guest.execute("query-migrate")["blocked-reasons"] == ["SEV: Migration is not implemented"]


def test_sev_es_guest_is_launched(sev_machine: DescribeSev, start: StartGuest) -> None:
    """It would run on a real processor only."""
    guest = start(sev_machine(policy=POLICY_SEV_ES, more=("-S",)))
    (context,) = contexts()
    assert context.asid < FIRST_SEV_ASID
    assert context.vmsas == 1
    assert guest.execute("query-sev")["state"] == "launch-secret"
