"""
Recover interrupted hops: complete them, or roll them back. The guest then runs in its new QEMU, or in the old one.

The :mod:`sevhop.records.journal` has what was in progress; what has become of it is probed: which processes exist, what
they answer, the run mark, and, for a domain of libvirt, what its keeper has. The rules are those of the hop itself
(:mod:`sevhop.engine.ownership`). Before the commit the destination is terminated, verified to have exited, and the
source is resumed; after the commit there is no rollback, only completion. Where it is unknown whether the guest has run
in the destination, neither QEMU is resumed or terminated: that needs manual action. Nothing is done to a hop whose
command is still alive, and nothing is done twice: a recovery may be interrupted and repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from sevhop_qmp.errors import MonitorError, SevhopError
from sevhop_qmp.monitor import COMMAND_TIMEOUT
from sevhop_qmp.process import QemuProcess
from sevhop_qmp.run_mark import RunState

from ..errors import RecoveryRequired
from ..process import launch
from ..records import journal, run_directory
from ..records.journal import HopRecord, Journal, JournalError
from ..records.run_directory import HopInProgress
from . import protected_state
from .guest_paths import GuestPaths
from .interrupted_qemu import NewQemu, OldQemu
from .ownership import Course, Destination, Facts, Source, decide
from .realtime_reset import reset_boosted
from .recovery_result import RecoveredGuest, RecoveryOutcome

log = logging.getLogger(__name__)

#: Seconds between two polls of a destination that loads.
_POLL = 0.01


async def recover(names: Sequence[str] = (), *, timeout: float = COMMAND_TIMEOUT) -> list[RecoveredGuest]:
    """
    Complete interrupted hops, or roll them back.

    :param names: of guests; all when there are none. An upgrade that was prepared on purpose is skipped then.
    :param timeout: seconds for each step.
    """
    journal.remove_unfinished()
    found = [one for path in journal.journals() if (one := await _recover(path, names, timeout)) is not None]
    run_directory.sweep({read_directory(path) for path in journal.journals()})
    return found


def read_directory(path: Path) -> str:
    """The run directory that a journal names; empty if the journal cannot be read."""
    try:
        return journal.read(path).directory
    except JournalError:
        return ""


async def _recover(path: Path, names: Sequence[str], timeout: float) -> RecoveredGuest | None:
    try:
        record = journal.read(path)
    except JournalError as err:
        return None if names or not path.exists() else RecoveredGuest(path.name, RecoveryOutcome.MANUAL, str(err))
    if names and record.guest not in names and record.uuid not in names:
        return None
    try:
        mine = Journal.take_over(path)
    except HopInProgress as err:
        return RecoveredGuest(record.guest, RecoveryOutcome.IN_PROGRESS, err.message)
    except JournalError as err:
        return None if not path.exists() else RecoveredGuest(record.guest, RecoveryOutcome.MANUAL, str(err))
    log.info("%s: interrupted in phase %s", record.guest, record.phase)
    try:
        recovered = await _complete_or_roll_back(mine, bool(names), timeout)
    except SevhopError as err:
        mine.leave()
        return RecoveredGuest(record.guest, RecoveryOutcome.MANUAL, str(err))
    except BaseException:
        mine.leave()
        raise
    if recovered.result is RecoveryOutcome.IN_PROGRESS:
        mine.leave()
    else:
        mine.end()
    return recovered


async def _complete_or_roll_back(mine: Journal, named: bool, timeout: float) -> RecoveredGuest:
    record = mine.record
    if not record.this_boot:
        return RecoveredGuest(
            record.guest,
            RecoveryOutcome.GONE,
            "the host was rebooted during the hop, and its memory is lost; start the guest again",
        )
    if record.kind == "domain":
        # libvirt is only needed here, and is optional.
        from . import domain_recovery

        return await domain_recovery.complete_or_roll_back(mine, named=named)
    source = record.source.open()
    process = record.destination.open() if record.destination else None
    for one in (source, process):
        if one is not None:
            reset_boosted(one.threads)
    try:
        old = OldQemu(source, record.monitor, record.run_mark, timeout)
        return await InterruptedHop(record, old, NewQemu(process, Path(record.directory), timeout), timeout).settle()
    finally:
        if source is not None:
            source.close()


class InterruptedHop:
    """
    A hop of a guest outside libvirt whose command has exited.

    :param timeout: seconds that a destination has for loading a state which exists nowhere else.
    """

    def __init__(self, record: HopRecord, old: OldQemu, new: NewQemu, timeout: float) -> None:
        self._record = record
        self._old = old
        self._new = new
        self._timeout = timeout
        self._notes: list[str] = []
        self._status = ""
        try:
            self._guest_paths = GuestPaths.from_fields(record.guest_paths) if record.guest_paths else GuestPaths([])
        except (ValueError, TypeError, KeyError) as err:
            raise JournalError(f"the journal of {record.guest} has invalid guest paths: {err!r}") from err

    async def settle(self) -> RecoveredGuest:
        """
        Complete it, or roll it back. What was done already is not done again.

        :raises RecoveryRequired: it is unknown which of the two is right, or it failed. No QEMU that may have the guest
            was terminated, and the source executes nothing, unless it ran.
        """
        try:
            while True:
                if self._released():
                    # All is done; only the journal was not removed.
                    self._guest_paths.publish()
                    return RecoveredGuest(self._record.guest, RecoveryOutcome.DESTINATION)
                facts = await self._probe()
                decision = decide(facts)
                log.info("%s: %s, %s", self._record.guest, facts, decision)
                match decision.course:
                    case Course.GONE:
                        return await self._gone(decision.reason)
                    case Course.MANUAL:
                        await self._leave(facts, decision.reason)
                    case Course.COMPLETE:
                        return await self._complete(resume=decision.resume)
                    case Course.ROLL_BACK if not self._new.alive:
                        return await self._roll_back()
                await self._terminate_destination(facts)
        finally:
            await self._old.close()
            await self._new.close()

    def _released(self) -> bool:
        return self._record.phase == "finish" and self._new.alive and not Path(self._record.directory).exists()

    async def _probe(self) -> Facts:
        record = self._record
        deadline = asyncio.get_running_loop().time() + self._timeout
        while True:
            source = await self._old.probe()
            seen = await self._new.probe()
            # Only the destination has the guest, and its stream has ended: it will load the rest, or fail.
            waits = source is Source.ENDED and seen.destination is Destination.LOADING
            if not waits or asyncio.get_running_loop().time() > deadline:
                break
            await asyncio.sleep(_POLL)
        self._status = seen.status
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

    async def _complete(self, *, resume: bool) -> RecoveredGuest:
        record = self._record
        if resume:
            await self._old.halt()
            await self._new.resume_guest()
        elif not record.running:
            await self._new.activate_images()
        elif self._status != "running":
            # It ran there, and something has stopped it since. It stays stopped.
            self._notes.append(f"the guest is {self._status}")
        noted = len(self._notes)
        if not await self._new.finish(self._old, self._guest_paths, record, self._notes.append):
            raise RecoveryRequired(f"the guest is in the new QEMU, but {'; '.join(self._notes[noted:])}")
        return RecoveredGuest(record.guest, RecoveryOutcome.DESTINATION, "; ".join(self._notes))

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

    async def _roll_back(self) -> RecoveredGuest:
        record = self._record
        self._guest_paths.discard()
        if self._old.process is not None and record.phase not in ("", "check", "acquire"):
            with contextlib.suppress(OSError):  # it has just exited
                launch.set_oom_score_adj(self._old.process.pid, record.oom_score_adj)
        protected_state.restore(self._old.process, record.protected_state)
        try:
            state = await self._old.resume(running=record.running and record.stopped)
        except MonitorError:
            if self._old.alive:
                raise
            what = (
                "its SEV context had been moved to the new QEMU" if record.context != "none" else "its QEMU has exited"
            )
            return RecoveredGuest(record.guest, RecoveryOutcome.GONE, what)
        # If something other than the hop has stopped it, it stays stopped.
        text = f"the guest is {state}" if record.running and state != "running" else ""
        return RecoveredGuest(record.guest, RecoveryOutcome.SOURCE, text)

    async def _gone(self, reason: str) -> RecoveredGuest:
        await self._new.terminate()
        self._guest_paths.discard()
        await self._old.terminate()
        return RecoveredGuest(self._record.guest, RecoveryOutcome.GONE, reason)
