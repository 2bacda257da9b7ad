"""When the timer recovers a hop whose recovery has failed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sevhop.engine import hop_recovery, recovery
from sevhop.engine.recovery_result import RecoveredGuest, RecoveryOutcome
from sevhop.errors import GuestState, RecoveryRequired
from sevhop.options import RecoverOptions
from sevhop.records import back_off, hop_record, journal, run_directory
from sevhop.records.hop_record import HopRecord, Process
from sevhop.records.journal import Journal
from sevhop_qmp.errors import SevhopError

RECORD = HopRecord(kind="standalone", guest="/run/qmp", context="none", running=True, source=Process(1 << 30, 1))
TIMER, PERSON = RecoverOptions(unattended=True), RecoverOptions()


class Clock:
    """The host's, in seconds since it was booted; and the recovery of the hop, which fails with a reason."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.reason = "libvirt is not there"
        self.attempts: list[float] = []

    async def settle(self, record: HopRecord, timeout: float) -> RecoveredGuest:
        """In the place of :func:`.hop_recovery.settle`."""
        self.attempts.append(self.now)
        if self.reason:
            raise SevhopError(self.reason)
        return RecoveredGuest(record.guest, RecoveryOutcome.SOURCE)


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    """A hop that was interrupted."""
    made = Clock()
    monkeypatch.setattr(journal, "DIRECTORY", tmp_path / "journal")
    monkeypatch.setattr(run_directory, "RUN", tmp_path / "run")
    for module in (hop_record, back_off):
        monkeypatch.setattr(module, "uptime", lambda: made.now)
    monkeypatch.setattr(hop_recovery, "settle", made.settle)
    Journal.begin(RECORD).leave()
    yield made


def recovered(options: RecoverOptions) -> RecoveredGuest:
    """What comes of a recovery."""
    (one,) = asyncio.run(recovery.recover((), options))
    return one


def test_timer_waits_longer_after_each_failure(clock: Clock) -> None:
    for _ in range(8 * 60):
        recovered(TIMER)
        clock.now += 60
    waits = [after - before for before, after in zip(clock.attempts, clock.attempts[1:], strict=False)]
    assert waits[:8] == [60, 120, 240, 480, 960, 1920, 3600, 3600]


def test_timer_reports_the_last_reason_until_it_tries_again(clock: Clock) -> None:
    assert recovered(TIMER).result is RecoveryOutcome.MANUAL
    one = recovered(TIMER)
    assert (one.result, len(clock.attempts)) == (RecoveryOutcome.POSTPONED, 1)
    assert one.detail.startswith("libvirt is not there; tried again after ")
    assert one.detail.endswith(", or by: sevhop recover /run/qmp")


@pytest.mark.parametrize(
    ("state", "end"),
    [(GuestState.IN_TRANSIT, "(try); the guest is running in the transit"), (GuestState.UNKNOWN, "(try)")],
)
def test_failure_is_reported_with_the_state_of_the_guest(
    clock: Clock, state: GuestState, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def settle(record: HopRecord, timeout: float) -> RecoveredGuest:
        raise RecoveryRequired("no", "try", state)

    monkeypatch.setattr(hop_recovery, "settle", settle)
    assert recovered(PERSON).detail == f"no {end}"


def test_person_is_never_made_to_wait(clock: Clock) -> None:
    for _ in range(3):
        assert recovered(PERSON).result is RecoveryOutcome.MANUAL
    assert len(clock.attempts) == 3


def test_failure_of_a_person_begins_the_count_again(clock: Clock) -> None:
    for _ in range(5):
        recovered(TIMER)
        clock.now += 3600
    recovered(PERSON)
    clock.now += 61
    recovered(TIMER)
    assert len(clock.attempts) == 7


def test_recovery_that_succeeds_leaves_no_journal(clock: Clock) -> None:
    recovered(TIMER)
    clock.now += 61
    clock.reason = ""
    assert recovered(TIMER).result is RecoveryOutcome.SOURCE
    assert list(journal.journals()) == []


@pytest.mark.parametrize("time", [0.0, -1e300, 1e300, float("inf")])
def test_journal_never_makes_the_timer_wait_for_more_than_an_hour(time: float) -> None:
    assert 0 <= back_off.remaining(replace(RECORD, failures=1, next_attempt=time)) <= 3600


def test_failure_is_recorded_as_the_journal_can_have_it() -> None:
    fields: dict[str, Any] = back_off.after_failure(RECORD, "a\0b", unattended=True)
    assert RECORD.with_fields(fields).failure == "ab"
