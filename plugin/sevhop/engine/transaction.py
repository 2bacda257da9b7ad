"""
What the two engines, :mod:`sevhop.engine.hop` and :mod:`sevhop.engine.upgrade`, have in common: phases one after the
other, told to a listener, a report of how they went, a journal of what was begun, and an end that the caller can tell
by its class.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from sevhop_qmp.errors import SevhopError

from ..cancellation import shielded, wait_out
from ..errors import Lost, NeedsRecover, Refused
from ..events import Ended, Event, GuestRuns, GuestStopped, Listener, PhaseBegan, PhaseEnded
from ..records.journal import Entry, Journal, JournalError
from ..report import Phase, Report

Answer = TypeVar("Answer")

log = logging.getLogger(__name__)

_OUTCOMES: dict[type[SevhopError], str] = {Refused: "refused", NeedsRecover: "needs-recover", Lost: "lost"}


class Procedure(abc.ABC):
    """
    One hop, by whichever way. :meth:`run` it once; :meth:`interrupt` may be called from a signal handler meanwhile.

    :ivar report: filled in as it goes on, complete when :meth:`run` has returned or raised.
    """

    def __init__(self, guest: str, listener: Listener) -> None:
        """:param listener: told of what happens, also while the guest is stopped; it must not take its time."""
        self.report = Report(guest=guest)
        self._named = guest
        self._tell: Callable[[Event], None] = listener
        self._resources = contextlib.AsyncExitStack()
        self._task: asyncio.Task[object] | None = None
        self._journal: Journal | None = None
        self._phase = ""
        self._stopped_at: float | None = None
        self._unfinished = False
        self._undoing = False

    async def run(self) -> Report:
        """
        Go through it.

        :raises Refused: the guest cannot hop; nothing was touched.
        :raises Undone: something failed and the guest runs where it ran.
        :raises NeedsRecover: something failed, the guest does not run, but nothing of it is lost.
        :raises Lost: its QEMU ended by itself before its state was saved.
        """
        self._task = asyncio.current_task()
        try:
            async with self._resources:
                await self._go()
        except SevhopError as err:
            self.report.outcome = _OUTCOMES.get(type(err), "undone")
            self.report.reason = str(err)
            raise
        else:
            self.report.outcome = self._outcome()
        finally:
            if self._journal is not None:
                stays = self._unfinished or self.report.outcome in ("", "needs-recover")
                await shielded(asyncio.to_thread(self._journal.leave if stays else self._journal.end))
            if self.report.outcome:
                self._tell(Ended(self._named, self.report))
        return self.report

    def interrupt(self) -> bool:
        """Undo as soon as possible. :return: False when it is too late for that: then it goes on to its end."""
        if self._task is None or self._past_undoing():
            return False
        if not self._undoing:
            self._undoing = True
            self._task.cancel()
        return True

    @abc.abstractmethod
    async def _go(self) -> None:
        """All phases, and what is undone if one fails."""

    @abc.abstractmethod
    def _past_undoing(self) -> bool:
        """Whether an interrupt comes too late."""

    def _outcome(self) -> str:
        return "done"

    async def _do(self, name: str, phase: Callable[[], Awaitable[None]]) -> None:
        """Go through a phase: tell when it begins and when it is over, also by failure, and how long it took."""
        self._phase = name
        log.info("%s: %s", self.report.guest, name)
        self._remember(phase=name)
        self._tell(PhaseBegan(self._named, name))
        began = time.monotonic()
        try:
            await phase()
        finally:
            done = Phase(name, (time.monotonic() - began) * 1e3)
            self.report.phases.append(done)
            self._tell(PhaseEnded(self._named, name, done.ms))

    async def _in_full(self, undoing: Coroutine[Any, Any, Answer]) -> Answer:
        """Do something that belongs to undoing, whoever cancels us meanwhile: undoing is what that asks for."""
        self._undoing = True
        task = asyncio.ensure_future(undoing)
        await wait_out(task)
        return task.result()

    async def _begin_journal(self, entry: Entry) -> None:
        """:raises Refused: somebody else is hopping the guest, or there is no journal to be had."""

        async def begin() -> None:
            # In a thread, like its end: it waits for the disk, and another guest may be stopped meanwhile.
            self._journal = await asyncio.to_thread(Journal.begin, entry)

        try:
            await shielded(begin())
        except SevhopError as err:
            raise Refused(err.message, err.hint) from err

    def _remember(self, **facts: Any) -> None:
        """
        Write something down before it is done.

        :raises JournalError: that is not possible, and it is not too late to undo.
        """
        if self._journal is None:
            return
        try:
            self._journal.write(facts, flush=self._stopped_at is None or self.report.blackout_ms is not None)
        except JournalError as err:
            if not self._past_undoing():
                raise
            self._note(err.message)

    def _begin_of_blackout(self) -> None:
        self._tell(GuestStopped(self._named))
        self._stopped_at = time.monotonic()

    def _end_of_blackout(self) -> None:
        if self._stopped_at is not None and self.report.blackout_ms is None:
            self.report.blackout_ms = (time.monotonic() - self._stopped_at) * 1e3
            self._tell(GuestRuns(self._named, self.report.blackout_ms))

    def _note(self, text: str) -> None:
        log.warning("%s", text)
        self.report.notes.append(text)


def expected(error: BaseException) -> SevhopError:
    """The error itself if it was raised on purpose; otherwise one that says that there is a bug."""
    if isinstance(error, SevhopError):
        return error
    log.error("unexpected error", exc_info=error)
    return SevhopError(f"unexpected {type(error).__name__}: {error}", "this is a bug in sevhop")
