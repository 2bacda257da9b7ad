"""
Recover: hops that were broken off, brought to one of two ends. The guest runs in its old QEMU, or in the new one.

What was under way is in the :mod:`.journal`; what has become of it is looked up: which processes are there, what they
answer, and, for a domain of libvirt, what its keeper holds. The rules are those of the hop itself. Before the commit
the destination is ended, seen to have ended, and the source goes on; behind it there is only forward. Nothing is done
to a hop whose command is still alive, and nothing twice: all of it may be broken off and repeated.
"""

from __future__ import annotations

import contextlib
import enum
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sevhop_qmp import adopt
from sevhop_qmp.errors import CommandError, MonitorError, SevhopError
from sevhop_qmp.monitor import COMMAND_TIMEOUT, Monitor
from sevhop_qmp.process import QemuProcess

from . import block_graph, journal, run_directory
from .destination import Destination
from .errors import NeedsRecover
from .hop import let_run, resume_source, retire
from .journal import Entry, Journal, JournalError
from .name_plates import NamePlates
from .run_directory import HopUnderWay
from .urgency import relax

log = logging.getLogger(__name__)


class End(enum.Enum):
    """What a recovery came to."""

    SOURCE = "runs in the old QEMU"
    DESTINATION = "runs in the new QEMU"
    GONE = "is gone"
    UNDER_WAY = "is being hopped"
    STUCK = "needs help"


@dataclass(frozen=True)
class Recovered:
    """
    One hop, after the recovery.

    :ivar text: the reason, or what is worth knowing.
    """

    guest: str
    end: End
    text: str = ""

    def __str__(self) -> str:
        return f"{self.guest}: {self.end.value}" + (f": {self.text}" if self.text else "")

    def as_json(self) -> dict[str, object]:
        """For ``--json``."""
        return {"guest": self.guest, "end": self.end.name.lower().replace("_", "-"), "text": self.text}


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
        from . import domain_recover

        return await domain_recover.finish_or_undo(mine, named=named)
    source = entry.source.open()
    process = entry.destination.open() if entry.destination else None
    try:
        return await _Bare(entry, source, process, timeout).finish_or_undo()
    finally:
        if source is not None:
            source.close()


class _Bare:
    """A hop of a guest outside libvirt."""

    def __init__(self, entry: Entry, source: QemuProcess | None, process: QemuProcess | None, timeout: float) -> None:
        self._entry = entry
        self._source = source
        self._process = process
        self._timeout = timeout
        self._notes: list[str] = []
        try:
            self._plates = NamePlates.from_facts(entry.plates) if entry.plates else NamePlates([])
        except (ValueError, TypeError, KeyError) as err:
            raise JournalError(f"the journal of {entry.guest} has no name plates: {err!r}") from err

    async def finish_or_undo(self) -> Recovered:
        for process in (self._source, self._process):
            if process is not None:
                relax(process.threads)
        destination = await self._reach() if self._process is not None else None
        if destination is not None and await self._is_there(destination):
            return await self._forward(destination)
        if self._process is not None and self._released():
            # All is done; only the journal had not been told.
            self._process.close()
            self._plates.hand_over()
            return Recovered(self._entry.guest, End.DESTINATION)
        return await self._back(destination)

    def _released(self) -> bool:
        return self._entry.phase == "retire" and not Path(self._entry.directory).exists()

    async def _reach(self) -> Destination | None:
        """The destination, None if it does not answer and cannot have the guest, so that it may be ended."""
        assert self._process is not None
        try:
            return await Destination.reach(self._process, Path(self._entry.directory), timeout=self._timeout)
        except MonitorError as err:
            pid = self._process.pid
            if self._released():
                return None
            if self._entry.committed or self._entry.phase in ("commit", "resume", "retire"):
                raise NeedsRecover(
                    f"the new QEMU (process {pid}) may have the guest, and does not answer: {err.message}",
                    "see why; then run sevhop recover again",
                ) from err
            if self._source is None and self._entry.loaded:
                raise NeedsRecover(f"the guest is in process {pid}, which does not answer: {err.message}") from err
            return None

    async def _is_there(self, destination: Destination) -> bool:
        """Whether the guest is in the destination for good."""
        entry = self._entry
        if entry.committed or (entry.loaded and self._source is None):
            return True
        if (await destination.monitor.execute("query-status"))["running"]:
            return True
        return entry.context != "none" and (await adopt.adopt_status(destination.monitor)).moved

    # -- forward -----------------------------------------------------------------------------------

    async def _forward(self, destination: Destination) -> Recovered:
        entry = self._entry
        if entry.broken:
            raise NeedsRecover(f"the guest is in process {destination.process.pid}, and cannot run: {entry.broken}")
        monitor = await self._source_monitor()
        try:
            if monitor is not None and (await monitor.execute("query-status"))["running"]:
                raise NeedsRecover("its old QEMU was continued by somebody else, and has it as well", "end one of them")
            if entry.context != "none" and not (await adopt.adopt_status(destination.monitor)).moved:
                pid = destination.process.pid
                raise NeedsRecover(f"all of it is in process {pid} but the SEV context, which ended with its old QEMU")
            if entry.running and not (await destination.monitor.execute("query-status"))["running"]:
                await adopt.adopt_ram(destination.monitor)  # who would be asked otherwise has died
                await let_run(destination.monitor)
            elif not entry.running:
                await block_graph.activate(destination.monitor)
            finished = await retire(
                self._source,
                monitor,
                destination,
                self._plates,
                context=entry.context,
                timeout=self._timeout,
                note=self._notes.append,
            )
        finally:
            if monitor is not None:
                await monitor.close()
        if not finished:
            raise NeedsRecover(f"it runs in process {destination.process.pid}, but {'; '.join(self._notes)}")
        return Recovered(entry.guest, End.DESTINATION, "; ".join(self._notes))

    # -- back --------------------------------------------------------------------------------------

    async def _back(self, destination: Destination | None) -> Recovered:
        entry = self._entry
        if destination is not None:
            await destination.kill()
        elif self._process is not None:
            await Destination(self._process, Path(entry.directory)).kill()
        self._plates.take_back()
        if self._source is None:
            return Recovered(entry.guest, End.GONE, "its QEMU has ended" + (", and the new one" * entry.loaded))
        if entry.committed and (entry.context != "none" or entry.running):
            # It ran in the destination, which has ended since. What the source has is of the past.
            self._source.kill()
            await self._source.wait(self._timeout)
            return Recovered(entry.guest, End.GONE, "it ran in the new QEMU, which has ended")
        await self._continue_source()
        if not self._source.alive:
            return Recovered(entry.guest, End.GONE, "its SEV context had been moved to the new QEMU, which has ended")
        return Recovered(entry.guest, End.SOURCE)

    async def _continue_source(self) -> None:
        monitor = await self._source_monitor()
        if monitor is None:
            raise NeedsRecover(f"its old QEMU (process {self._entry.source.pid}) has ended")
        async with monitor:
            await resume_source(monitor, running=self._entry.running)
            with contextlib.suppress(MonitorError, CommandError):
                await monitor.remove_fds()

    async def _source_monitor(self) -> Monitor | None:
        """
        The source's monitor; None when it has ended.

        :raises MonitorError: it does not answer, or is somebody else's.
        """
        if self._source is None:
            return None
        path = self._entry.monitor
        try:
            monitor = await Monitor.connect(path, timeout=self._timeout, greeting_timeout=self._timeout)
        except MonitorError:
            if not self._source.alive:
                return None
            raise
        if monitor.peer != self._source.pid:
            await monitor.close()
            raise MonitorError(f"{path} is not served by process {self._source.pid}")
        return monitor
