"""
Recover an interrupted hop of a guest outside libvirt: see :mod:`sevhop.engine.recovery`.

What has become of it is probed: which processes exist, what they answer, the run mark. The rules are those of the hop
itself (:mod:`sevhop.engine.ownership`). Before the commit the destination is terminated, verified to have exited, and
the source is resumed; after the commit there is no rollback, only completion. Where it is unknown whether the guest has
run in the destination, neither QEMU is resumed or terminated: that needs manual action.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from sevhop_qmp.errors import MonitorError
from sevhop_qmp.invalid_data import invalid
from sevhop_qmp.process import QemuProcess
from sevhop_qmp.run_mark import RunState

from ..errors import LOST_HINT, RecoveryRequired
from ..records import journal
from ..records.hop_record import HopRecord
from ..records.journal import JournalError
from . import protected_state
from .finish import complete
from .guest_paths import GuestPaths
from .interrupted_qemu import NewQemu, OldQemu
from .ownership import Course, Destination, Facts, Source, decide
from .realtime_reset import reset_boosted
from .recovery_result import RecoveredGuest, RecoveryOutcome, stopped_until_now
from .stopped_guest import restore_oom_score_adj

log = logging.getLogger(__name__)

#: Seconds between two polls of a destination that loads.
_POLL = 0.01
_AGAIN = "run sevhop recover again"


async def settle(record: HopRecord, timeout: float) -> RecoveredGuest:
    """
    Finish the hop, or roll it back.

    :param timeout: seconds for each step.
    :raises SevhopError: that is not possible now, or needs manual action.
    """
    source = record.source.open()
    destination = record.destination.open() if record.destination else None
    for one in (source, destination):
        if one is not None:
            reset_boosted(one.threads)
    try:
        old = OldQemu(source, record.monitor, record.run_mark, timeout)
        return await InterruptedHop(old, NewQemu(destination, Path(record.directory), timeout), timeout).settle(record)
    finally:
        if source is not None:
            source.close()


class InterruptedHop:
    """
    The two QEMUs of a hop whose command has exited.

    :param timeout: seconds that a destination has for loading a state which exists nowhere else.
    """

    def __init__(self, old: OldQemu, new: NewQemu, timeout: float) -> None:
        self._old = old
        self._new = new
        self._timeout = timeout
        self._status = ""
        self._source_ran = False

    async def settle(self, record: HopRecord) -> RecoveredGuest:
        """
        Finish the hop, or roll it back. What was done already is not done again.

        :raises JournalError: the record is invalid; nothing was touched.
        :raises RecoveryRequired: it is unknown which of the two is right, or it failed. No QEMU that may have the guest
            was terminated, and the source executes nothing, unless it ran.
        """
        try:
            paths = _guest_paths(record)
            while True:
                if self._released(record):
                    # All is done; only the journal was not removed.
                    paths.publish()
                    return RecoveredGuest(record.guest, RecoveryOutcome.DESTINATION)
                facts = await self._probe(record)
                decision = decide(facts)
                log.info("%s: %s, %s", record.guest, facts, decision)
                match decision.course:
                    case Course.GONE:
                        return await self._gone(record, decision.reason)
                    case Course.MANUAL:
                        await self._leave(facts, decision.reason)
                    case Course.COMPLETE:
                        return await self.finish(record, resume=decision.resume)
                    case Course.ROLL_BACK if not self._new.alive:
                        return await self.rollback(record)
                await self._terminate_destination(facts)
        finally:
            await self._old.close()
            await self._new.close()

    async def finish(self, record: HopRecord, *, resume: bool) -> RecoveredGuest:
        """
        The guest is the destination's: what is left of the phases resume and finish.

        :param resume: whether it must be resumed there.
        :raises SevhopError: it does not run there, or does not answer yet.
        """
        notes: list[str] = []
        if resume:
            await self._old.halt()
            await self._new.resume_guest()
        elif not record.running:
            await self._new.activate_images()
        elif self._status != "running":
            # It ran there, and something has stopped it since. It stays stopped.
            notes.append(f"the guest is {self._status}")
        await self._complete(record, notes)
        stopped_ms = stopped_until_now(record) if resume else None
        return RecoveredGuest(record.guest, RecoveryOutcome.DESTINATION, "; ".join(notes), stopped_ms)

    async def _complete(self, record: HopRecord, notes: list[str]) -> None:
        """:raises SevhopError: not all is done."""
        completed = await complete(
            self._old.process,
            await self._new.take(),
            _guest_paths(record),
            oom_score_adj=record.oom_score_adj,
            timeout=self._timeout,
            note=notes.append,
        )
        if not completed:
            raise RecoveryRequired(f"the guest is in the new QEMU, but {notes[-1]}", _AGAIN)

    async def rollback(self, record: HopRecord) -> RecoveredGuest:
        """
        The guest is the source's, and the destination has exited: undo what the phases before the commit have made.

        :raises SevhopError: the source cannot be resumed.
        """
        _guest_paths(record).discard()
        if self._old.process is not None and record.phase not in ("", "check", "acquire"):
            restore_oom_score_adj(self._old.process, record.oom_score_adj)
        protected_state.restore(self._old.process, record.protected_state)
        try:
            state = await self._old.resume(
                running=record.running and record.stopped, reboot_action=record.reboot_action
            )
        except MonitorError:
            if self._old.alive:
                raise
            what = (
                "its SEV context had been moved to the new QEMU" if record.context != "none" else "its QEMU has exited"
            )
            return RecoveredGuest(record.guest, RecoveryOutcome.GONE, f"{what}; {LOST_HINT}")
        # If something other than the hop has stopped it, it stays stopped.
        text = f"the guest is {state}" if record.running and state != "running" else ""
        resumed = state == "running" and record.stopped and not self._source_ran
        stopped_ms = stopped_until_now(record) if resumed else None
        return RecoveredGuest(record.guest, RecoveryOutcome.SOURCE, text, stopped_ms)

    def _released(self, record: HopRecord) -> bool:
        return record.phase == "finish" and self._new.alive and not Path(record.directory).exists()

    async def _probe(self, record: HopRecord) -> Facts:
        deadline = asyncio.get_running_loop().time() + self._timeout
        while True:
            source = await self._old.probe()
            seen = await self._new.probe()
            # Only the destination has the guest, and its stream has ended: it will load the rest, or fail.
            waits = source is Source.ENDED and seen.destination is Destination.LOADING
            if not waits or asyncio.get_running_loop().time() > deadline:
                break
            await asyncio.sleep(_POLL)
        self._status, self._source_ran = seen.status, source is Source.RUNS
        return Facts(
            source,
            seen.destination,
            # Read after the destination was probed: if that one has exited, nobody writes the mark any more.
            mark=self._old.run_state(),
            ran=seen.ran,
            moved=seen.moved,
            phase=record.phase,
            committed=record.committed,
            loaded=record.loaded,
            broken=record.broken,
            sev=record.context != "none",
            running=record.running,
        )

    async def _leave(self, facts: Facts, reason: str) -> NoReturn:
        """Manual action is required. Until then the source, which may be outdated, cannot be resumed by accident."""
        if facts.has_run is not False and facts.source is not Source.RUNS:
            await self._old.halt()
        pids = [f"{name} is process {one.pid}" for name, one in self._processes().items()]
        raise RecoveryRequired(
            f"{reason} ({', '.join(pids)}{'; the old one is halted' if facts.source is Source.HALTED else ''})",
            "find out why; then run sevhop recover again",
        )

    def _processes(self) -> dict[str, QemuProcess]:
        both = {"the old QEMU": self._old.process, "the new one": self._new.process}
        return {name: process for name, process in both.items() if process is not None}

    async def _terminate_destination(self, facts: Facts) -> None:
        """Terminate it, unless it turns out that it has the guest after all: then decide again."""
        await self._new.halt()
        now = facts
        if self._old.alive:
            mark = self._old.run_state()
            # What it has reported before is outdated if it has begun to run since.
            now = replace(facts, mark=mark, ran=None if mark is RunState.STARTING else facts.ran)
        if decide(now).course is not Course.ROLL_BACK:
            self._new.thaw()
            return
        await self._new.terminate()

    async def _gone(self, record: HopRecord, reason: str) -> RecoveredGuest:
        await self._new.terminate()
        _guest_paths(record).discard()
        await self._old.terminate()
        return RecoveredGuest(record.guest, RecoveryOutcome.GONE, f"{reason}; {LOST_HINT}")


def _guest_paths(record: HopRecord) -> GuestPaths:
    """:raises JournalError: they are invalid."""
    try:
        return GuestPaths.from_fields(record.guest_paths) if record.guest_paths else GuestPaths([])
    except (ValueError, TypeError, KeyError) as err:
        raise JournalError(
            f"the journal of {record.guest} has invalid guest paths: {invalid(err)}",
            f"find out which QEMU has the guest, then remove its journal in {journal.DIRECTORY}",
        ) from err
