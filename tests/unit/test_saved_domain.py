"""A domain that another client saves to disk during its upgrade: nothing is lost, and nothing is left to recover."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sevhop.engine import upgrade_prepare
from sevhop.engine.domain_recovery import InterruptedUpgrade
from sevhop.engine.recovery_result import RecoveryOutcome
from sevhop.errors import GuestLost, GuestState, HopError, RolledBack
from sevhop.records.hop_record import HopRecord, Process


class Domain:
    """One without a QEMU. It stands in for its connection, too."""

    def __init__(self, *, saved: bool) -> None:
        self._saved = saved

    async def domain_with(self, _: str) -> Domain:
        return self

    async def active(self) -> bool:
        return False

    async def saved(self) -> bool:
        return self._saved


class Exited:
    """A QEMU."""

    async def lives_on(self) -> bool:
        return False


class Checked:
    """What an upgrade has checked. Its QEMU has exited since."""

    def __init__(self, domain: Domain) -> None:
        self.source = Exited()
        self.saved_by_another = domain.saved


@pytest.mark.parametrize(
    ("saved", "error", "state"),
    [(True, RolledBack, GuestState.SAVED), (False, GuestLost, GuestState.GONE)],
)
def test_rollback_loses_no_guest_that_was_saved(saved: bool, error: type[HopError], state: GuestState) -> None:
    checked: Any = Checked(Domain(saved=saved))
    with pytest.raises(error) as caught:
        asyncio.run(upgrade_prepare._verify_alive(checked))
    assert caught.value.guest_state is state
    assert caught.value.hint


@pytest.mark.parametrize(("saved", "result"), [(True, RecoveryOutcome.SAVED), (False, RecoveryOutcome.GONE)])
def test_recovery_reports_no_guest_as_gone_that_was_saved(saved: bool, result: RecoveryOutcome) -> None:
    connection: Any = Domain(saved=saved)
    record = HopRecord(kind="domain", guest="web1", context="none", running=True, source=Process(1 << 30, 1))
    recovered = asyncio.run(InterruptedUpgrade(record, connection, None, None).settle(named=True))
    assert recovered.result is result
    assert recovered.detail
