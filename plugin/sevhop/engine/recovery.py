"""
Recover: hops that were broken off, brought to one of two ends. The guest runs in its old QEMU, or in the new one.

What was under way is in the :mod:`sevhop.records.journal`; what has become of it is looked up: which processes are
there, what they answer, the run mark, and, for a domain of libvirt, what its keeper holds. The rules are those of the
hop itself (:mod:`sevhop.engine.ownership`). Before the commit the destination is ended, seen to have ended, and the
source goes on; behind it there is only forward. Where it cannot be told whether the guest has run in the destination,
neither QEMU is continued or terminated, and a person must look. Nothing is done to a hop whose command is still alive,
and nothing twice: all of it may be broken off and repeated.
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

from ..errors import NeedsRecover
from ..process import launch
from ..records import journal, run_directory
from ..records.journal import Entry, Journal, JournalError
from ..records.run_directory import HopUnderWay
from .guest_paths import NamePlates
from .interrupted_qemu import NewQemu, OldQemu
from .ownership import Course, Destination, Facts, Source, decide
from .realtime_reset import relax
from .recovery_result import End, Recovered

log = logging.getLogger(__name__)

#: Seconds between two looks at a destination that loads.
_POLL = 0.01


async def recover(names: Sequence[str] = (), *, timeout: float = COMMAND_TIMEOUT) -> list[Recovered]:
    """
    Bring hops that were broken off to their end.

    :param names: of guests; all when there are none. An upgrade that was only prepared is left alone then.
    :param timeout: seconds for each step.
    """
    journal.remove_unfinished()
    found = [one for path in journal.journals() if (one := await _recover(path, names, timeout)) is not None]
    run_directory.sweep({read_directory(path) for path in journal.journals()})
    return found


def read_directory(path: Path) -> str:
    """The run directory that a journal mentions; empty if that cannot be told."""
    try:
        return journal.read(path).directory
    except JournalError:
        return ""


async def _recover(path: Path, names: Sequence[str], timeout: float) -> Recovered | None:
    try:
        entry = journal.read(path)
    except JournalError as err:
        return None if names or not path.exists() else Recovered(path.name, End.STUCK, str(err))
    if names and entry.guest not in names and entry.uuid not in names:
        return None
    try:
        mine = Journal.take_over(path)
    except HopUnderWay as err:
        return Recovered(entry.guest, End.UNDER_WAY, err.message)
    except JournalError as err:
        return None if not path.exists() else Recovered(entry.guest, End.STUCK, str(err))
    log.info("%s: broken off in the phase %s", entry.guest, entry.phase)
    try:
        result = await _finish_or_undo(mine, bool(names), timeout)
    except SevhopError as err:
        mine.leave()
        return Recovered(entry.guest, End.STUCK, str(err))
    except BaseException:
        mine.leave()
        raise
    if result.end is End.UNDER_WAY:
        mine.leave()
    else:
        mine.end()
    return result


async def _finish_or_undo(mine: Journal, named: bool, timeout: float) -> Recovered:
    entry = mine.entry
    if not entry.this_boot:
        return Recovered(
            entry.guest,
            End.GONE,
            "the host was started anew while its memory was between two QEMUs; start it afresh",
        )
    if entry.kind == "domain":
        # libvirt is only needed here, and is optional.
        from . import domain_recovery

        return await domain_recovery.finish_or_undo(mine, named=named)
    source = entry.source.open()
    process = entry.destination.open() if entry.destination else None
    for one in (source, process):
        if one is not None:
            relax(one.threads)
    try:
        old = OldQemu(source, entry.monitor, entry.run_mark, timeout)
        return await InterruptedHop(entry, old, NewQemu(process, Path(entry.directory), timeout), timeout).settle()
    finally:
        if source is not None:
            source.close()


class InterruptedHop:
    """
    A hop of a guest outside libvirt that nobody is at any more.

    :param timeout: seconds that a destination has for loading a state which nobody else has any more.
    """

    def __init__(self, entry: Entry, old: OldQemu, new: NewQemu, timeout: float) -> None:
        self._entry = entry
        self._old = old
        self._new = new
        self._timeout = timeout
        self._notes: list[str] = []
        self._status = ""
        try:
            self._plates = NamePlates.from_facts(entry.plates) if entry.plates else NamePlates([])
        except (ValueError, TypeError, KeyError) as err:
            raise JournalError(f"the journal of {entry.guest} has no name plates: {err!r}") from err

    async def settle(self) -> Recovered:
        """
        Bring it to its end. What has been done already is not done again.

        :raises NeedsRecover: it cannot be told what that is, or it could not be done. Nobody who may have the guest was
            terminated, and the source executes nothing, unless it ran.
        """
        try:
            while True:
                if self._released():
                    # All is done; only the journal had not been told.
                    self._plates.hand_over()
                    return Recovered(self._entry.guest, End.DESTINATION)
                facts = await self._look()
                decision = decide(facts)
                log.info("%s: %s, %s", self._entry.guest, facts, decision)
                match decision.course:
                    case Course.GONE:
                        return await self._gone(decision.reason)
                    case Course.MANUAL:
                        await self._leave(facts, decision.reason)
                    case Course.FORWARD:
                        return await self._forward(resume=decision.resume)
                    case Course.BACK if not self._new.alive:
                        return await self._back()
                await self._end_destination(facts)
        finally:
            await self._old.close()
            await self._new.close()

    def _released(self) -> bool:
        return self._entry.phase == "retire" and self._new.alive and not Path(self._entry.directory).exists()

    async def _look(self) -> Facts:
        entry = self._entry
        deadline = asyncio.get_running_loop().time() + self._timeout
        while True:
            source = await self._old.look()
            seen = await self._new.look()
            # Nobody else has it, and nobody gives it more of its state: that comes to an end by itself.
            waits = source is Source.ENDED and seen.destination is Destination.LOADING
            if not waits or asyncio.get_running_loop().time() > deadline:
                break
            await asyncio.sleep(_POLL)
        self._status = seen.status
        return Facts(
            source,
            seen.destination,
            # Looked at behind the destination: if that one has ended nobody writes it any more.
            mark=self._old.run_state(),
            ran=seen.ran,
            moved=seen.moved,
            phase=entry.phase,
            committed=entry.committed,
            loaded=entry.loaded,
            broken=entry.broken,
            sev=entry.context != "none",
            running=entry.running,
        )

    async def _leave(self, facts: Facts, reason: str) -> NoReturn:
        """A person must decide. Until then nobody can have the source run by accident what may be elsewhere."""
        if facts.has_run is not False and facts.source is not Source.RUNS:
            await self._old.halt()
        pids = [f"{name} is process {one.pid}" for name, one in self._processes().items()]
        raise NeedsRecover(
            f"{reason} ({', '.join(pids)}{'; the old one is halted' if facts.source is Source.HALTED else ''})",
            "see why; then run sevhop recover again",
        )

    def _processes(self) -> dict[str, QemuProcess]:
        both = {"the old QEMU": self._old.process, "the new one": self._new.process}
        return {name: process for name, process in both.items() if process is not None}

    async def _forward(self, *, resume: bool) -> Recovered:
        entry = self._entry
        if resume:
            await self._old.halt()
            await self._new.let_run()
        elif not entry.running:
            await self._new.take_images()
        elif self._status != "running":
            # It ran there. Whoever or whatever has stopped it since had a reason.
            self._notes.append(f"the guest is {self._status}")
        noted = len(self._notes)
        if not await self._new.retire(self._old, self._plates, entry, self._notes.append):
            raise NeedsRecover(f"it is in the new QEMU, but {'; '.join(self._notes[noted:])}")
        return Recovered(entry.guest, End.DESTINATION, "; ".join(self._notes))

    async def _end_destination(self, facts: Facts) -> None:
        """Terminate it, unless it turns out that it has the guest after all: then look again."""
        await self._new.halt()
        now = replace(facts, mark=self._old.run_state()) if self._old.alive else facts
        if decide(now).course is not Course.BACK:
            self._new.go_on()
            return
        await self._new.terminate()

    async def _back(self) -> Recovered:
        entry = self._entry
        self._plates.take_back()
        if self._old.process is not None and entry.phase not in ("check", "hold"):
            with contextlib.suppress(OSError):  # it has just ended
                launch.set_oom_score_adj(self._old.process.pid, entry.oom_score_adj)
        try:
            state = await self._old.resume(running=entry.running and entry.stopped)
        except MonitorError:
            if self._old.alive:
                raise
            what = "its SEV context had been moved to the new QEMU" if entry.context != "none" else "its QEMU has ended"
            return Recovered(entry.guest, End.GONE, what)
        # If it was not the hop that has stopped it, whoever did had a reason.
        text = f"the guest is {state}" if entry.running and state != "running" else ""
        return Recovered(entry.guest, End.SOURCE, text)

    async def _gone(self, reason: str) -> Recovered:
        await self._new.terminate()
        self._plates.take_back()
        await self._old.terminate()
        return Recovered(self._entry.guest, End.GONE, reason)
