"""Transactions: what is rolled back and in which order, when there is no rollback, and the state of the guest then."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sevhop import events
from sevhop.engine.transaction import CommitState, Transaction
from sevhop.errors import GuestLost, GuestState, HopError, Interrupted, RecoveryRequired, Refused, RolledBack
from sevhop.records.journal import JournalError
from sevhop_qmp.errors import SevhopError


class Scripted(Transaction):
    """A transaction that runs the script of a test."""

    def __init__(self, script: Callable[[Scripted], Awaitable[None]], journal: Any = None) -> None:
        super().__init__("guest", events.ignore)
        self._do = script
        self._journal = journal
        self.undone: list[str] = []

    async def _script(self) -> None:
        await self._do(self)

    def undo(self, name: str, error: SevhopError | None = None) -> None:
        """Push an undo that is remembered, and may fail."""

        async def work() -> None:
            await asyncio.sleep(0)
            self.undone.append(name)
            if error is not None:
                raise error

        self.rollback.push(work)


def failed(script: Callable[[Scripted], Awaitable[None]]) -> tuple[Scripted, HopError]:
    """Run a script that is expected to fail; the error."""
    transaction = Scripted(script)
    with pytest.raises(HopError) as caught:
        asyncio.run(transaction.run())
    assert transaction.report.guest_state is caught.value.guest_state
    return transaction, caught.value


async def stop_and_fail(transaction: Scripted) -> None:
    transaction.downtime_begins()
    raise SevhopError("it failed", "try again")


def test_rollback_undoes_the_last_first() -> None:
    async def script(transaction: Scripted) -> None:
        transaction.undo("destination")
        transaction.rollback.push(lambda: transaction.undone.append("plain"))
        transaction.undo("stop")
        await transaction.run_phase("save", stop_and_fail(transaction))

    transaction, error = failed(script)
    assert transaction.undone == ["stop", "plain", "destination"]
    assert isinstance(error, RolledBack)
    assert (error.message, error.hint) == ("save: it failed", "try again")
    assert error.guest_state is GuestState.RUNNING_IN_OLD
    assert transaction.report.downtime_ms is not None


def test_rollback_stops_at_an_undo_that_fails() -> None:
    async def script(transaction: Scripted) -> None:
        transaction.undo("acquire")
        transaction.undo("stop", SevhopError("it does not run"))
        await stop_and_fail(transaction)

    transaction, error = failed(script)
    assert transaction.undone == ["stop"]
    assert isinstance(error, RecoveryRequired)
    assert error.message.endswith("it failed; rollback failed: it does not run")
    assert error.guest_state is GuestState.UNKNOWN, "nobody must resume it on the strength of a guess"
    assert transaction.report.downtime_ms is None, "the downtime has not ended"


@pytest.mark.parametrize(
    "undo",
    [
        RecoveryRequired("it is there", guest_state=GuestState.RUNNING_IN_NEW),
        GuestLost("its QEMU has exited"),
        RolledBack("it was saved", guest_state=GuestState.SAVED),
    ],
)
def test_rollback_reports_where_the_guest_is(undo: HopError) -> None:
    async def script(transaction: Scripted) -> None:
        transaction.undo("source", undo)
        await stop_and_fail(transaction)

    _, error = failed(script)
    assert (type(error), error.guest_state) == (type(undo), undo.guest_state)
    assert error.message.endswith(f"it failed; {undo.message}")


def test_guest_that_was_paused_stays_paused() -> None:
    async def script(transaction: Scripted) -> None:
        transaction.downtime.disown()
        raise SevhopError("it failed")

    assert failed(script)[1].guest_state is GuestState.PAUSED_IN_OLD


def test_refused_hop_touches_nothing() -> None:
    async def script(transaction: Scripted) -> None:
        raise Refused("it cannot hop")

    transaction, error = failed(script)
    assert (error.guest_state, transaction.report.outcome) == (GuestState.UNTOUCHED, "refused")


def test_undo_with_a_bug_requires_recovery() -> None:
    async def script(transaction: Scripted) -> None:
        def undo() -> None:
            raise KeyError("missing")

        transaction.rollback.push(undo)
        await stop_and_fail(transaction)

    transaction, error = failed(script)
    assert isinstance(error, RecoveryRequired)
    assert "it failed; rollback failed: unexpected KeyError" in error.message
    assert transaction.report.outcome == "recovery-required"


def test_unknown_commit_is_not_recorded_as_one() -> None:
    """The journal must not have ``sevhop recover`` terminate a source that may have the guest."""

    async def script(transaction: Scripted) -> None:
        transaction.commit(GuestState.UNKNOWN)
        assert journal.written[-1]["committed"] is False
        transaction.commit(GuestState.PAUSED_IN_NEW)
        assert journal.written[-1]["committed"] is True

    journal = Journal()
    asyncio.run(Scripted(script, journal).run())


def test_commit_leaves_nothing_to_undo() -> None:
    async def script(transaction: Scripted) -> None:
        transaction.undo("stop")
        transaction.downtime_begins()
        with transaction.committing():
            assert not transaction.interrupt()
            transaction.commit(GuestState.PAUSED_IN_NEW)
        assert not transaction.interrupt()
        raise SevhopError("the new one does not answer")

    transaction, error = failed(script)
    assert transaction.undone == []
    assert isinstance(error, RecoveryRequired)
    assert error.guest_state is GuestState.PAUSED_IN_NEW


def test_failure_after_the_commit_has_the_hint_of_the_commit() -> None:
    """That of the failure is for the next try; there is none."""

    async def script(transaction: Scripted) -> None:
        transaction.commit(GuestState.SUSPENDED, hint)
        raise SevhopError("it does not answer", "try again")

    hint = "virsh restore image"
    transaction, error = failed(script)
    assert error.hint == hint
    assert (transaction.report.reason, transaction.report.hint) == (f"{error.message} ({hint})", hint)
    hint = ""
    assert failed(script)[1].hint == "run: sevhop recover guest"


def test_error_with_a_guest_state_is_raised_unchanged() -> None:
    reason = OSError("why")
    restored = RolledBack("it was restored", guest_state=GuestState.PAUSED_IN_OLD)

    async def script(transaction: Scripted) -> None:
        transaction.commit(GuestState.SUSPENDED)
        raise restored from reason

    transaction, error = failed(script)
    assert error is restored
    assert (error.__cause__, transaction.report.outcome) == (reason, "rolled-back")


def test_commit_that_was_refused_is_rolled_back() -> None:
    async def script(transaction: Scripted) -> None:
        transaction.undo("stop")
        with transaction.committing():
            raise SevhopError("EBUSY")

    transaction, error = failed(script)
    assert transaction.undone == ["stop"]
    assert transaction.state is CommitState.UNDOABLE
    assert isinstance(error, RolledBack)


def test_interrupt_rolls_back_once() -> None:
    async def script(transaction: Scripted) -> None:
        transaction.undo("destination")
        transaction.undo("stop")
        assert transaction.interrupt()
        assert transaction.interrupt(), "the second is not heard in the middle of the rollback"
        await asyncio.sleep(10)

    transaction, error = failed(script)
    assert transaction.undone == ["stop", "destination"]
    assert isinstance(error, Interrupted)


def test_cancellation_after_the_commit_requires_recovery() -> None:
    """By whoever cancels the task itself, instead of asking."""

    async def script(transaction: Scripted) -> None:
        transaction.undo("stop")
        transaction.commit(GuestState.RUNNING_IN_NEW)
        raise asyncio.CancelledError

    transaction, error = failed(script)
    assert transaction.undone == []
    assert (type(error), error.guest_state) == (RecoveryRequired, GuestState.RUNNING_IN_NEW)


class Journal:
    """Notes what was written, and which lines were flushed; may be full."""

    def __init__(self) -> None:
        self.flushed: list[bool] = []
        self.written: list[dict[str, Any]] = []
        self.full = False

    def write(self, fields: dict[str, Any], *, flush: bool) -> None:
        if self.full:
            raise JournalError("no space")
        self.flushed.append(flush)
        self.written.append(fields)

    def end(self) -> None:
        pass

    leave = end


def test_record_is_not_flushed_during_the_downtime() -> None:
    async def script(transaction: Scripted) -> None:
        transaction.record(phase="stop")
        transaction.downtime_begins()
        transaction.record(phase="save")
        transaction.downtime_ends()
        transaction.record(phase="finish")

    journal = Journal()
    asyncio.run(Scripted(script, journal).run())
    assert journal.flushed == [True, False, True]


@pytest.mark.parametrize("committed", [False, True])
def test_record_failure_fails_the_hop_only_before_the_commit(committed: bool) -> None:
    async def script(transaction: Scripted) -> None:
        if committed:
            transaction.commit(GuestState.PAUSED_IN_NEW)
        journal.full = True
        transaction.record(phase="finish")

    journal = Journal()
    transaction = Scripted(script, journal)
    if committed:
        assert asyncio.run(transaction.run()).notes == ["no space"]
    else:
        with pytest.raises(RolledBack, match="no space"):
            asyncio.run(transaction.run())
