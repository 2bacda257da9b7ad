"""
A transaction: phases one after the other, a stack of what is rolled back if one fails, and one commit.

Both engines, :mod:`sevhop.engine.hop` and :mod:`sevhop.engine.upgrade`, are transactions. A phase is a function: it
takes the frozen results of earlier phases and returns its own, and pushes an undo on the rollback stack where it makes
what must be rolled back. The transaction itself has what all phases share: the report, the record in the journal, the
rollback stack, the clock of the downtime, cancellation, and :class:`CommitState`, which decides whether a failure is
rolled back.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import enum
import inspect
import logging
import shlex
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from typing import Any, TypeVar

from sevhop_qmp.errors import SevhopError

from ..cancellation import shielded, wait_out
from ..errors import LOST_HINT, GuestLost, GuestState, HopError, Interrupted, RecoveryRequired, Refused, RolledBack
from ..events import Event, GuestResumed, GuestStopped, HopFinished, Listener, PhaseBegan, PhaseEnded
from ..records.hop_record import HopRecord, uptime
from ..records.journal import Journal, JournalError
from ..report import Phase, Report

Answer = TypeVar("Answer")
#: Undoes one thing; a coroutine function, or a plain one.
Undo = Callable[[], Awaitable[None] | None]

log = logging.getLogger(__name__)

_OUTCOMES: dict[type[SevhopError], str] = {
    Refused: "refused",
    RecoveryRequired: "recovery-required",
    GuestLost: "guest-lost",
}


class CommitState(enum.Enum):
    """
    Whether a failure is rolled back.

    ``UNDOABLE``
        it is
    ``COMMITTING``
        the commit is in progress, and may not be interrupted; if it fails for certain, the transaction is undoable
    ``COMMITTED``
        there is no rollback, only completion
    """

    UNDOABLE = enum.auto()
    COMMITTING = enum.auto()
    COMMITTED = enum.auto()


class RollbackStack:
    """The undos, run last in, first out. One that fails ends the rollback; the rest is left to ``sevhop recover``."""

    def __init__(self) -> None:
        self._undos: list[Undo] = []

    def push(self, undo: Undo) -> None:
        """Undo this before everything that was pushed earlier."""
        self._undos.append(undo)

    def clear(self) -> None:
        """The transaction was committed."""
        self._undos.clear()

    async def unwind(self) -> None:
        """
        Undo everything.

        :raises SevhopError: an undo failed.
        """
        while self._undos:
            result = self._undos.pop()()
            if inspect.isawaitable(result):
                await result


class DowntimeClock:
    """
    Measures the guest's downtime: from the order to stop it until it runs again, in whichever QEMU.

    :ivar ms: milliseconds, when it runs again; None before, and for a guest that was paused all the time.
    :ivar disowned: something else has stopped the guest, or it was paused before: it is not the hop's to resume.
    """

    def __init__(self) -> None:
        self.ms: float | None = None
        self.disowned = False
        self._began: float | None = None

    @property
    def began(self) -> bool:
        """Whether the hop has stopped the guest. It does not resume a guest that it has not stopped."""
        return self._began is not None

    @property
    def running(self) -> bool:
        """Whether the guest is stopped now because of the hop."""
        return self.began and self.ms is None

    def begin(self) -> None:
        """The guest is about to be stopped."""
        self._began = time.monotonic()
        self.disowned = False

    def end(self) -> None:
        """The guest runs again."""
        if self._began is not None:
            self.ms = (time.monotonic() - self._began) * 1e3

    def disown(self) -> None:
        """The guest is not the hop's to resume."""
        self.disowned = True
        self._began = None


class Transaction(abc.ABC):
    """
    One hop or upgrade. :meth:`run` it once; :meth:`interrupt` may be called from a signal handler meanwhile.

    :ivar report: filled in by the phases, complete when :meth:`run` has returned or raised.
    :ivar resources: what is closed in the end, whatever the outcome.
    :ivar rollback: what is rolled back if a phase fails before the commit.
    :ivar state: whether a failure is rolled back.
    :ivar committed_state: what the guest is since the commit.
    :ivar committed_hint: what to do if the completion fails; empty if that is ``sevhop recover``.
    :ivar phase: the phase in progress.
    :ivar unfinished: the guest is fine, but something is left to do for ``sevhop recover``.
    """

    def __init__(self, guest: str, listener: Listener) -> None:
        """:param listener: called with each event, also while the guest is stopped; it must not block."""
        self.report = Report(guest=guest)
        self.resources = contextlib.AsyncExitStack()
        self.rollback = RollbackStack()
        self.downtime = DowntimeClock()
        self.state = CommitState.UNDOABLE
        self.committed_state = GuestState.UNKNOWN
        self.committed_hint = ""
        self.phase = ""
        self.unfinished = False
        self.named = guest
        self.emit: Callable[[Event], None] = listener
        self._task: asyncio.Task[object] | None = None
        self._journal: Journal | None = None
        self._rolling_back = False

    async def run(self) -> Report:
        """
        Run the transaction.

        :raises Refused: the guest cannot hop; nothing was touched.
        :raises RolledBack: a phase failed, and the guest is in the old QEMU as before, or where another client put it.
        :raises RecoveryRequired: a phase failed, nothing of the guest is lost, and ``sevhop recover`` must act.
        :raises GuestLost: its QEMU exited before its state was saved, or all that had the guest did.
        """
        self._task = asyncio.current_task()
        try:
            async with self.resources, self._rolled_back_on_failure():
                await self._script()
        except SevhopError as err:
            if isinstance(err, RecoveryRequired) and not err.hint:
                err.hint = f"run: sevhop recover {shlex.quote(self.report.guest)}"
            elif isinstance(err, GuestLost) and not err.hint:
                err.hint = LOST_HINT
            self.report.outcome = _OUTCOMES.get(type(err), "rolled-back")
            self.report.reason, self.report.hint = str(err), err.hint
            if isinstance(err, HopError):
                self.report.guest_state = err.guest_state
            raise
        else:
            self.report.outcome = self._outcome()
        finally:
            if self._journal is not None:
                stays = self.unfinished or self.report.outcome in ("", "recovery-required")
                await shielded(asyncio.to_thread(self._journal.leave if stays else self._journal.end))
            if self.report.outcome:
                self.emit(HopFinished(self.named, self.report))
        return self.report

    def interrupt(self) -> bool:
        """Roll back as soon as possible. :return: False if it is too late, and the transaction will be completed."""
        if self._task is None or self.state is not CommitState.UNDOABLE:
            return False
        if not self._rolling_back:
            self._rolling_back = True
            self._task.cancel()
        return True

    @abc.abstractmethod
    async def _script(self) -> None:
        """All phases in their order. What it raises before the commit is rolled back."""

    def _outcome(self) -> str:
        return "done"

    # -- phases ------------------------------------------------------------------------------------

    async def run_phase(self, name: str, work: Coroutine[Any, Any, Answer]) -> Answer:
        """Run a phase: record its name, report its begin and its end, also by failure, and how long it took."""
        self.phase = name
        log.info("%s: %s", self.report.guest, name)
        try:
            self.record(phase=name)
        except BaseException:
            work.close()
            raise
        self.emit(PhaseBegan(self.named, name))
        began = time.monotonic()
        try:
            return await work
        finally:
            done = Phase(name, (time.monotonic() - began) * 1e3)
            self.report.phases.append(done)
            self.emit(PhaseEnded(self.named, name, done.ms))

    def note(self, text: str) -> None:
        """Report something that does not matter to the guest."""
        log.warning("%s", text)
        self.report.notes.append(text)

    # -- commit and rollback -----------------------------------------------------------------------

    @contextlib.contextmanager
    def committing(self) -> Iterator[None]:
        """Around the commit: until it is known how that went, nobody interrupts it."""
        self.state = CommitState.COMMITTING
        try:
            yield
        finally:
            if self.state is CommitState.COMMITTING:
                self.state = CommitState.UNDOABLE

    def commit(self, guest_state: GuestState, hint: str = "") -> None:
        """
        From here on there is no rollback, only completion.

        :param guest_state: what the guest is now; reported if the completion fails. As long as it is unknown, the
            journal does not have the commit: the source may have the guest, and ``sevhop recover`` finds that out.
        :param hint: what to do then, if it is not to run ``sevhop recover``.
        """
        self.state = CommitState.COMMITTED
        self.committed_state = guest_state
        self.committed_hint = hint
        self.rollback.clear()
        self.record(committed=guest_state is not GuestState.UNKNOWN)

    @contextlib.asynccontextmanager
    async def _rolled_back_on_failure(self) -> AsyncIterator[None]:
        """Around the script: an error before the commit is rolled back, whatever it is, and raised as a HopError."""
        try:
            yield
        except BaseException as err:
            failure = self._classify(err)
            if self.state is not CommitState.COMMITTED:
                await self.uncancelled(self._roll_back(failure))
            raise failure from (err.__cause__ if failure is err else err)

    def _classify(self, error: BaseException) -> HopError:
        """The error to raise for one in a phase; its class and ``guest_state`` say what became of the guest."""
        if isinstance(error, HopError):
            return error
        interrupted = Interrupted("interrupted") if isinstance(error, asyncio.CancelledError) else None
        if interrupted is not None and self.state is not CommitState.COMMITTED:
            return interrupted
        failure = interrupted or expected(error)
        message = f"{self.phase}: {failure.message}"
        if self.state is CommitState.COMMITTED:
            # The hint of the failure is that of a hop that was rolled back.
            return RecoveryRequired(message, self.committed_hint, self.committed_state)
        return RolledBack(message, failure.hint)

    async def _roll_back(self, failure: HopError) -> None:
        """
        Roll back, because of a failure.

        :raises RecoveryRequired: that is not possible; nothing of the guest is lost.
        :raises RolledBack: the hop is rolled back, and the guest is where another client has put it.
        :raises GuestLost: its QEMU has exited, and no other process had all of it.
        """
        try:
            await self.rollback.unwind()
        except HopError as err:
            raise type(err)(f"{failure.message}; {err.message}", err.hint, err.guest_state) from failure
        except SevhopError as err:
            raise RecoveryRequired(f"{failure.message}; rollback failed: {err.message}", err.hint) from failure
        except Exception as err:
            raise RecoveryRequired(f"{failure.message}; rollback failed: {expected(err).message}") from failure
        self.downtime_ends()
        if self.downtime.disowned and failure.guest_state is GuestState.RUNNING_IN_OLD:
            failure.guest_state = GuestState.PAUSED_IN_OLD

    async def uncancelled(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """Run a part of a rollback, and ignore cancellation meanwhile: a rollback is what that asks for."""
        self._rolling_back = True
        task = asyncio.ensure_future(work)
        await wait_out(task)
        return task.result()

    # -- the downtime ------------------------------------------------------------------------------

    def downtime_begins(self) -> None:
        """The guest is about to be stopped."""
        self.emit(GuestStopped(self.named))
        self.downtime.begin()

    def downtime_ends(self) -> None:
        """The guest runs again; nothing if it had not been stopped, or does already."""
        if self.downtime.running:
            self.downtime.end()
            self.report.downtime_ms = self.downtime.ms
            assert self.downtime.ms is not None
            self.emit(GuestResumed(self.named, self.downtime.ms))

    # -- the journal -------------------------------------------------------------------------------

    async def begin_record(self, record: HopRecord) -> None:
        """:raises Refused: another command is hopping the guest, or the journal cannot be written."""

        async def begin() -> None:
            # In a thread, like its end: it waits for the disk, and another guest may be stopped meanwhile.
            self._journal = await asyncio.to_thread(Journal.begin, record)

        try:
            await shielded(begin())
        except SevhopError as err:
            raise Refused(err.message, err.hint) from err

    def record(self, **fields: Any) -> None:
        """
        Write something into the journal before it is done.

        :raises JournalError: that is not possible, and the hop can still be rolled back.
        """
        if self._journal is None:
            return
        if fields.get("stopped"):
            fields["stopped_at"] = uptime()
        try:
            # No fsync while the guest is stopped.
            self._journal.write(fields, flush=not self.downtime.running)
        except JournalError as err:
            if self.state is CommitState.UNDOABLE:
                raise
            self.note(err.message)


def expected(error: BaseException) -> SevhopError:
    """The error itself if it was raised on purpose; otherwise one that reports a bug."""
    if isinstance(error, SevhopError):
        return error
    log.error("unexpected error", exc_info=error)
    return SevhopError(f"unexpected {type(error).__name__}: {error}", "this is a bug in sevhop: report it")
