"""
Recover for a domain whose guest runs in the transit: see :mod:`sevhop.engine.domain_recovery`.

===================================  ========================================================================
a keeper has the transit             the domain is restored, and the guest hops into it
the guest has hopped                 the persistent definition gets the new emulator
keeper and supervisor are gone       the transit is found by the journal. Unless the guest has hopped, it runs
                                     there again and a new keeper has it
the guest was switched off there     that is reported
===================================  ========================================================================

A guest with an SEV context has hopped when the context has left the transit (:mod:`sevhop.engine.transit_move`).
The transit is never terminated unless the guest is known to be in the destination.
"""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import shutil
import time
from pathlib import Path

from sevhop_qmp import adopt
from sevhop_qmp.errors import ProcessError, SevhopError
from sevhop_qmp.monitor import Monitor
from sevhop_qmp.process import QemuProcess
from sevhop_qmp.run_mark import RunMark, RunState

from ..errors import LOST_HINT, GuestLost, RecoveryRequired
from ..keeper.client import KeeperClient
from ..keeper.config import KeeperConfig, KeeperError, KeeperTimeout
from ..keeper.paths import KeeperPaths
from ..keeper.transit_state import TransitState
from ..libvirt import domain_xml
from ..libvirt.connection import Connection
from ..options import RecoverOptions
from ..records import run_directory
from ..records.hop_record import PREPARED, HopRecord
from ..records.journal import Journal
from . import fixed_taps, protected_state, transit_move
from .recovery_result import RecoveredGuest, RecoveryOutcome, stopped_until_now
from .stopped_guest import resume_source
from .transit import remove_confinement
from .transit_restore import InTransit, complete, restore_from_transit, take_into_keeper, write_image

#: Seconds for what is in progress, such as a restore by another client.
_PATIENCE = 60.0
_POLL = 0.05
#: Seconds in which a destination that has not run its guest exits when its keeper has; usually some milliseconds.
_EXIT = 5.0


async def settle(journal: Journal, connection: Connection, *, named: bool, options: RecoverOptions) -> RecoveredGuest:
    """
    Finish the second hop of a domain. However long its guest has been in the transit, it is alive.

    :param named: whether the caller has named this domain. One that waits in the transit on purpose is left there
        otherwise.
    :raises SevhopError: that is not possible now; the guest runs in the transit.
    """
    await _retire(journal.record, connection, options.step_timeout)
    if options.emulator is not None:
        journal.write({"new": options.emulator})
    record = journal.record
    keeper = await keeper_of(record, options.step_timeout)
    process = record.transit.open() if record.transit else None
    try:
        if process is not None:
            fixed_taps.rename(record.xml, process)
        recovery = TransitRecovery(record, connection, process, keeper, options)
        if keeper is None and process is None:
            return await recovery.without_transit()
        return await recovery.settle(named)
    finally:
        if recovery.keeper is not None:
            recovery.keeper.close()
        if process is not None:
            process.close()


async def _retire(record: HopRecord, connection: Connection, timeout: float) -> None:
    """The guest has left its old QEMU, which may still be there, halted."""
    source = record.source.open()
    if source is None:
        return
    source.kill()
    await source.wait(timeout)
    await source.wait_reaped(timeout)
    source.close()
    if (domain := await connection.domain_with(record.uuid)) is not None:
        await domain.destroy()


async def keeper_of(record: HopRecord, timeout: float) -> KeeperClient | None:
    """
    The keeper that has the transit, if there is one.

    :param timeout: seconds for its reply.
    :raises KeeperTimeout: it hangs. It goes on with what it does when it does not hang any more, so nobody else may.
    """
    directory = run_directory.hop_with(record.uuid)
    try:
        keeper = await KeeperClient.connect(directory)
    except KeeperError:
        return None
    usual, keeper.timeout = keeper.timeout, timeout
    try:
        status = await keeper.status()
        keeper.timeout = usual
        if status["uuid"] == record.uuid and status.get("transit"):
            return keeper
    except KeeperTimeout:
        keeper.close()
        raise
    except KeeperError:
        pass
    keeper.close()
    return None


class TransitRecovery:
    """A second hop that was interrupted, or has failed."""

    def __init__(
        self,
        record: HopRecord,
        connection: Connection,
        process: QemuProcess | None,
        keeper: KeeperClient | None,
        options: RecoverOptions,
    ) -> None:
        self.keeper = keeper
        self._record = record
        self._connection = connection
        self._process = process
        self._timeout = options.step_timeout
        self._only_new = options.emulator is not None
        self._outdated = ""
        self._stopped_ms = record.stopped_ms

    async def settle(self, named: bool) -> RecoveredGuest:
        """:raises SevhopError: see :func:`settle`."""
        if self._record.broken:
            raise RecoveryRequired(f"the guest is in the transit, and cannot run: {self._record.broken}", LOST_HINT)
        if self.keeper is None:
            if await self._has_hopped():
                return await self._finish()
            if self._outdated:
                return await self._gone(self._outdated)
            self.keeper = await self._keep_again()
        state = await self._settled()
        if state is TransitState.TRANSIT:
            if self._record.phase == PREPARED and not named:
                by_name = f"sevhop recover {shlex.quote(self._record.guest)}"
                detail = f"runs in the transit; to finish: virsh restore {self.keeper.image}, or {by_name}"
                return RecoveredGuest(self._record.guest, RecoveryOutcome.IN_PROGRESS, detail)
            try:
                if not self.keeper.image.exists():
                    write_image(self._transit(), self.keeper)
                restored = await restore_from_transit(self._connection, self._transit(), self.keeper)
            except GuestLost as err:
                return RecoveredGuest(self._record.guest, RecoveryOutcome.GONE, str(err))
            self._stopped_ms += restored.status["downtime_ms"]
            return await self._found([restored.failure, *restored.notes])
        status = await self.keeper.status()
        if state is TransitState.OVER:
            self._stopped_ms += status["downtime_ms"]
            return await self._finish()
        if state is not TransitState.ENDED:
            raise RecoveryRequired(
                f'keeper stuck in state "{state.value}" for {_PATIENCE:g} s',
                "its guest is not lost; see virsh list, then run sevhop recover again",
            )
        await self.keeper.release()
        detail = "; ".join(filter(None, [status["reason"], status["note"]]))
        return RecoveredGuest(self._record.guest, RecoveryOutcome.GONE, detail)

    def _transit(self) -> InTransit:
        record = self._record
        assert self._process is not None
        return InTransit(
            record.uri,
            record.guest,
            record.uuid,
            record.xml,
            record.kept or record.old,
            record.new,
            self._process,
            Path(record.transit_monitor),
            Path(record.transit_directory),
            tuple(record.cgroups),
            record.apparmor_profile,
            record.settings,
            only_new=self._only_new,
            step_timeout=max(self._timeout, KeeperConfig.step_timeout),
        )

    def _last_directory(self) -> Path:
        """Of the keeper that is gone."""
        return run_directory.hop_with(self._record.uuid)

    async def _settled(self) -> TransitState:
        """The state of the keeper, when no restore is in progress any more."""
        assert self.keeper is not None
        deadline = time.monotonic() + _PATIENCE
        while True:
            state = TransitState((await self.keeper.status())["state"])
            resting = state in (TransitState.TRANSIT, TransitState.OVER, TransitState.ENDED)
            if resting or (state is TransitState.RESTORING and not await self._active()):
                return TransitState.TRANSIT if state is TransitState.RESTORING else state
            if time.monotonic() > deadline:
                with contextlib.suppress(KeeperError):
                    await self.keeper.revoke()
                return TransitState((await self.keeper.status())["state"])
            await asyncio.sleep(_POLL)

    async def _active(self) -> bool:
        domain = await self._connection.domain_with(self._record.uuid)
        return domain is not None and await domain.active()

    # -- without a keeper ------------------------------------------------------------------------------

    async def _has_hopped(self) -> bool:
        """
        Whether the guest has hopped into the destination. One that has not run the guest exits when its keeper does.

        :raises SevhopError: that is not known, or a QEMU of somebody else runs the domain.
        """
        domain = await self._connection.domain_with(self._record.uuid)
        pid = None if domain is None or not await domain.active() else domain.living_pid()
        process = None if pid is None else QemuProcess.open(pid)
        try:
            if process is not None:
                self._verify_started_by_us(process)
                # Then it does not begin to run the guest, and what the mark says is true until it is thawed.
                await process.freeze(self._timeout)
            mark = await asyncio.to_thread(self._mark)
            left = mark is not RunState.RAN and await self._context_has_left(process)
            if process is not None and (mark is RunState.RAN or left):
                process.thaw()
                await self._finish_there(process)
                return True
            if process is not None:
                process.kill()
                await process.wait(self._timeout)
            if mark is RunState.STARTING:
                raise RecoveryRequired(
                    "the new QEMU has exited, and it is unknown whether the guest has run there",
                    f"the transit (process {self._record.transit and self._record.transit.pid}) has its last state",
                )
        finally:
            if process is not None:
                process.close()
        if domain is not None:
            await domain.destroy()
        if mark is RunState.RAN:
            self._outdated = "it ran in the new QEMU, which has exited"
        elif left:
            self._outdated = "its SEV context had been moved to the new QEMU, which has exited"
        return False

    async def _context_has_left(self, destination: QemuProcess | None) -> bool:
        """
        Whether the guest has an SEV context, and that is not in the transit any more.

        :param destination: halted, so that it does not move it now; None if it has exited.
        :raises SevhopError: the transit does not answer.
        """
        if self._record.context == "none":
            return False
        assert self._process is not None
        self._process.thaw()  # its guest is stopped
        try:
            async with await Monitor.connect(self._record.transit_monitor, timeout=self._timeout) as monitor:
                return await transit_move.has_left(monitor)
        except BaseException:
            if destination is not None:
                destination.thaw()
            raise

    async def _finish_there(self, process: QemuProcess) -> None:
        """
        What a keeper would have done in the destination, as far as that is possible.

        :raises ContextLost: the destination waits for a context that is in no transit any more.
        :raises RecoveryRequired: it does not run a guest with an SEV context.
        """
        paths = KeeperPaths(self._last_directory())
        try:
            async with await Monitor.connect(paths.monitor, timeout=self._timeout) as monitor:
                if monitor.peer == process.pid:
                    await transit_move.complete(monitor, process, None, 0.0)
                    await adopt.finish(monitor)
        except transit_move.ContextLost:
            raise
        except SevhopError as err:
            if self._record.context != "none":
                raise RecoveryRequired(f"the guest is in the new QEMU (process {process.pid}): {err.message}") from err

    def _verify_started_by_us(self, process: QemuProcess) -> None:
        """:raises RecoveryRequired: it was not started from the image of a keeper of this hop."""
        directory = str(self._last_directory())
        if not any(directory in value for value in process.environment.values()):
            raise RecoveryRequired(
                f"another client runs the domain (process {process.pid}) while its guest runs in the transit",
                "decide which of the two to keep; to keep the guest: virsh destroy the domain, then sevhop recover",
            )

    def _mark(self) -> RunState:
        """What the last hop out of the transit has recorded; ``NOT`` if there was none."""
        assert self._process is not None
        found = RunState.NOT
        for mark in RunMark.all_in(self._process):
            if mark.inode != self._record.run_mark:
                found = max(found, mark.read())
            mark.close()
        return found

    async def _keep_again(self) -> KeeperClient:
        """
        See that the guest runs in the transit, and have a new keeper for it.

        :raises SevhopError: that is not possible.
        """
        assert self._process is not None
        transit = self._transit()
        self._process.thaw()
        async with await Monitor.connect(transit.monitor, timeout=self._timeout) as monitor:
            await monitor.remove_fds()
            status = await adopt.adopt_status(monitor)
            if status.finished:
                protected_state.restore(self._process, status.protected_state_offset)
            stopped = not (await monitor.execute("query-status"))["running"]
            state = await resume_source(monitor, running=self._record.running)
            if stopped and state == "running":
                self._stopped_ms = stopped_until_now(self._record) or self._stopped_ms
            await adopt.finish(monitor)  # a command that was killed right after the commit has not
        return await take_into_keeper(transit)  # it removes what the last one has left

    async def without_transit(self) -> RecoveredGuest:
        """
        There is no transit any more. A destination of a guest without an SEV context has run it, or has exited with the
        keeper.
        """
        domain = await self._connection.domain_with(self._record.uuid)
        if domain is not None and await domain.active():
            if await self._has_the_guest(domain.living_pid()):
                return await self._finish()
            await domain.destroy()
        await self._remove_transit()
        detail = f"it was in the transit, which has exited; {LOST_HINT}"
        return RecoveredGuest(self._record.guest, RecoveryOutcome.GONE, detail)

    async def _has_the_guest(self, pid: int | None) -> bool:
        """
        Whether a destination without a keeper neither is about to exit, which libvirt notices some time later, nor
        waits for a context that is lost.

        :raises RecoveryRequired: it does not run its guest.
        """
        if pid is None:
            return False
        try:
            process = QemuProcess.open(pid)
        except ProcessError:
            return False
        try:
            if await process.wait(min(self._timeout, _EXIT)):
                return False
            if KeeperPaths(self._last_directory()).monitor.exists():
                await self._finish_there(process)
            return True
        except transit_move.ContextLost:
            return False
        finally:
            process.close()

    async def _gone(self, reason: str) -> RecoveredGuest:
        """What is in the transit is outdated, and nothing else is left."""
        assert self._process is not None
        self._process.kill()
        await self._process.wait(self._timeout)
        await self._remove_transit()
        return RecoveredGuest(self._record.guest, RecoveryOutcome.GONE, f"{reason}; {LOST_HINT}")

    async def _remove_transit(self) -> None:
        """Its process has exited: remove what was made for it."""
        record = self._record
        shutil.rmtree(record.transit_directory, ignore_errors=True)
        await remove_confinement(record.cgroups, record.apparmor_profile)

    # -- the end ---------------------------------------------------------------------------------------

    async def _finish(self, failure: str = "") -> RecoveredGuest:
        """The guest is in libvirt's QEMU: what is left of the upgrade."""
        record, notes = self._record, [failure]
        if self._process is not None:
            self._process.kill()
            await self._process.wait(self._timeout)
        await self._remove_transit()
        notes += await complete(self._connection, record.guest, record.uuid, record.old, self.keeper)
        return await self._found(notes)

    async def _found(self, notes: list[str]) -> RecoveredGuest:
        domain = await self._connection.domain_with(self._record.uuid)
        emulator = "" if domain is None else domain_xml.describe(await domain.xml()).emulator
        record = self._record
        old = bool(emulator) and (emulator == record.kept or emulator == record.old != record.new)
        result = RecoveryOutcome.SOURCE if old else RecoveryOutcome.DESTINATION
        return RecoveredGuest(record.guest, result, "; ".join(filter(None, notes)), self._stopped_ms or None)
