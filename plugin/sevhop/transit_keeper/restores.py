"""
The restores of a domain whose guest runs in the transit: in each, the guest may hop into what libvirt starts.

A restore begins with libvirt's hook. The destination is expected, queried, and has to announce the guest; when libvirt
has accepted it, the guest hops (:mod:`sevhop.engine.second_hop`), in this process. Whatever fails before that leads
back to the transit. A keeper that dies is continued by its successor, unless the guest was just hopping: then the guest
is where the run mark says. One with an SEV context is where that is, which the transit reports
(:mod:`sevhop.engine.transit_move`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from typing import Any

from sevhop_qmp import adopt
from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import QemuProcess

from ..engine import protected_state, transit_move
from ..engine.second_hop import Meeting, RestoredDestination, SecondHop, Stream
from ..engine.stopped_guest import resume_source
from ..errors import GuestState, HopError
from ..keeper import destination
from ..keeper.config import KeeperConfig, KeeperError
from ..keeper.destination import ProbedDestination
from ..keeper.domain_reboot import stop_at_reboot
from ..keeper.handover import SourceHandles
from ..keeper.paths import KeeperPaths
from ..keeper.restore import clear_monitor
from ..keeper.tasks import Tasks
from ..keeper.transit_state import RESTORE_ENDED, TransitState, reason_against_request
from ..options import HopOptions
from .attempt import TransitAttempt
from .ledger import Ledger
from .watch import End, TransitWatch

log = logging.getLogger(__name__)

#: The part of the step timeout for one of the waits of a request, whose reply is waited for that long.
_PART_OF_STEP = 0.8
#: States of the guest after which it is the destination's.
_ARRIVED = frozenset({GuestState.RUNNING_IN_NEW, GuestState.PAUSED_IN_NEW})
#: Seconds between two attempts to reach a transit that does not answer.
_POLL = 0.1
#: Seconds until a QEMU has exited that has hung up. Meanwhile nobody waits but for a guest that is paused.
_EXIT = 1.0


class Restores:
    """
    The restores of one domain, one at a time.

    :param restored: called when the guest is libvirt's again.
    :param ended: called when a client of libvirt's has ended the guest.
    :ivar arrived: the guest is the destination's.
    """

    def __init__(
        self,
        config: KeeperConfig,
        paths: KeeperPaths,
        handles: SourceHandles,
        ledger: Ledger,
        watch: TransitWatch,
        restored: Callable[[], Awaitable[None]],
        ended: Callable[[End], Awaitable[None]],
    ) -> None:
        self._config = config
        self._paths = paths
        self._handles = handles
        self._ledger = ledger
        self._watch = watch
        self._restored = restored
        self._ended = ended
        self._process = QemuProcess.open(config.pid)
        self._tasks = Tasks()
        self._pursuing: asyncio.Task[None] | None = None
        self._hop: SecondHop | None = None
        self._decided = False
        self.arrived = False

    @property
    def in_progress(self) -> bool:
        """Whether there is one that may yet succeed."""
        if self._ledger.record.state in (TransitState.MET, TransitState.HOPPING):
            return True
        return self._ledger.attempt is not None and self._ledger.attempt.in_progress

    @property
    def connected(self) -> bool:
        """Whether the QEMU of the one in progress has asked for the guest."""
        return self._ledger.attempt is not None and self._ledger.attempt.destination is not None

    # -- begin and end -------------------------------------------------------------------------------

    async def begin(self, hook: int) -> str:
        """
        libvirt restores the domain.

        :param hook: pid of its hook.
        :return: the emulator for the destination, and whether it is not the first one.
        """
        # libvirt waits for this hook, and does not answer meanwhile.
        await self.end(by_us=True)
        record = self._ledger.record
        if record.state is not TransitState.TRANSIT:
            return f"error {reason_against_request(record.state, 'restore the guest')}"
        clear_monitor(self._paths)
        self._ledger.attempt = attempt = self._new_attempt()
        attempt.begun_by(hook)
        record.reason, record.destination, record.moving = "", 0, False
        record.restores += 1
        self._ledger.enter(TransitState.RESTORING)
        self._decided = False
        self._pursuing = self._tasks.start(self._pursue(attempt))
        return f"{'ok' if record.restores == 1 else 'again'} {record.emulator}"

    def continue_attempt(self, fields: Mapping[str, Any], descriptors: dict[str, int]) -> None:
        """The last keeper has died during a restore."""
        self._ledger.attempt = attempt = self._new_attempt(descriptors)
        attempt.restore(fields, descriptors)
        # Where the guest is has been decided, and only has to be found out.
        self._decided = hopping = self._ledger.record.state is TransitState.HOPPING
        self._pursuing = self._tasks.start(self._settle(attempt) if hopping else self._pursue(attempt))

    def _new_attempt(self, stored: dict[str, int] | None = None) -> TransitAttempt:
        return TransitAttempt(self._config, self._paths, self._handles, self._process, self._connected, stored)

    def _connected(self, pid: int) -> None:
        self._ledger.record.destination = pid
        self._ledger.checkpoint()

    async def end(self, *, by_us: bool = False) -> None:
        """
        End the one in progress, unless it is too late for that; wait until it is over.

        :param by_us: not by a client of libvirt's, which is not asked then why the destination has exited.
        """
        pursuing, attempt = self._pursuing, self._ledger.attempt
        if pursuing is None or pursuing.done() or attempt is None:
            return
        attempt.ended_by_us = by_us
        if self._hop is not None:
            self._hop.interrupt()
        elif not self._decided:
            pursuing.cancel()
        await asyncio.wait({pursuing}, timeout=self._config.step_timeout * _PART_OF_STEP)

    async def end_for_good(self) -> None:
        """The same, however long that takes: the transit is about to be terminated, or has exited."""
        while (pursuing := self._pursuing) is not None and not pursuing.done():
            await self.end()
            await asyncio.wait({pursuing}, timeout=_POLL)

    # -- one restore ---------------------------------------------------------------------------------

    async def _pursue(self, attempt: TransitAttempt) -> None:
        """From the hook's ``restore begin`` on, until the guest has hopped or runs in the transit again."""
        try:
            probed = await attempt.unless_ended(destination.probe(self._config, self._paths))
            try:
                await self._hop_into(attempt, probed)
            finally:
                await probed.monitor.close()
        except asyncio.CancelledError:
            await self._undo(attempt, RESTORE_ENDED)
        except HopError as err:
            if err.guest_state in _ARRIVED and not await self._is_still_here(attempt):
                self._ledger.record.note = str(err)
                await self._arrived(attempt)
            else:
                await self._undo(attempt, str(err))
        except SevhopError as err:
            await self._undo(attempt, str(err))
        except Exception as err:
            log.exception("restore")
            await self._undo(attempt, f"unexpected {type(err).__name__}: {err}")
        else:
            await self._arrived(attempt)

    async def _hop_into(self, attempt: TransitAttempt, probed: ProbedDestination) -> None:
        config, ledger = self._config, self._ledger
        if attempt.destination is None or probed.process.pid != attempt.destination.pid:
            raise KeeperError(f"process {probed.process.pid} is the new QEMU, and has not asked for the guest's memory")
        if probed.lost:
            raise KeeperError(probed.lost, "choose another version of QEMU, or one with these features")
        ledger.record.version = probed.monitor.version

        def header_given() -> None:
            attempt.header_given = True
            ledger.checkpoint()

        def announced() -> None:
            attempt.announced = True
            ledger.checkpoint()

        def stopping(running: bool) -> None:
            ledger.record.was_paused = not running
            ledger.enter(TransitState.HOPPING)
            attempt.give_stream()

        def moving() -> None:
            ledger.record.moving = True
            ledger.checkpoint()

        def committed() -> None:
            ledger.record.committed = True
            if hop.report.move is not None:
                ledger.record.move = asdict(hop.report.move)
            ledger.checkpoint()

        reboots = await stop_at_reboot(config, probed.monitor)
        with probed.monitor.events("RESUME") as resumed:

            async def accepted() -> None:
                """libvirt says "cont" when its hooks have returned and it has no reason left to end the destination."""
                status = await adopt.adopt_status(probed.monitor)
                if not attempt.accepted and status.announced != "running":
                    event = probed.monitor.next_event(resumed, timeout=config.step_timeout)
                    await attempt.unless_ended(event)
                attempt.accepted = True
                ledger.enter(TransitState.MET)

            meeting = Meeting(
                monitor=await self._watch.connected(),
                transit=self._process,
                destination=RestoredDestination(probed.process, self._paths.directory, probed.monitor),
                source_vm_fd=self._handles.source_vm_fd,
                uid=config.uid,
                gid=config.gid,
                notice=attempt.port,
                run_mark=attempt.run_mark,
                stream=Stream(attempt.reader, attempt.duplicate_of_writer(), attempt.header_given),
                header_given=header_given,
                announced=announced,
                accepted=accepted,
                stopping=stopping,
                moving=moving,
                committed=committed,
            )
            options = HopOptions(step_timeout=config.step_timeout, move_deadline=config.move_deadline)
            self._hop = hop = SecondHop(config.name, meeting, options)
            try:
                report = await hop.run()
            finally:
                self._hop, self._decided = None, True
        ledger.record.note = "; ".join(filter(None, [reboots, *report.notes]))
        ledger.record.downtime_ms = report.downtime_ms or 0.0

    async def _settle(self, attempt: TransitAttempt) -> None:
        """The last keeper has died while the guest was hopping."""
        await self._halt(attempt)
        await self._undo(attempt, "the keeper has died")

    async def _halt(self, attempt: TransitAttempt) -> bool:
        """
        The destination does nothing more: it does not begin to run the guest, nor what it was ordered to do.

        :return: whether it is halted, or has exited.
        """
        process = attempt.destination
        halted = process is None or not process.alive or await process.freeze(self._config.step_timeout * _PART_OF_STEP)
        attempt.port.revoke_start()
        return halted

    async def _is_there(self, attempt: TransitAttempt) -> bool:
        """Whether the guest is the destination's, and what is in the transit is outdated."""
        record = self._ledger.record
        if attempt.has_run or (record.committed and not await self._is_still_here(attempt)):
            return True
        if not record.moving:
            return False
        while not await self._halt(attempt):
            log.warning("the new QEMU (process %d) cannot be halted yet", record.destination)
        self._process.thaw()  # its guest is stopped
        while self._process.alive and not attempt.has_run:
            try:
                return await transit_move.has_left(await self._watch.connected())
            except SevhopError as err:
                log.info("the transit does not answer: %s", err)
                await asyncio.sleep(_POLL)
        # The destination has all of the guest but perhaps the context, and that is in a VM that we have.
        return True

    async def _is_still_here(self, attempt: TransitAttempt) -> bool:
        """
        Whether the destination has exited with a guest that it has not run, since that was paused: the transit still
        has all of it, unless its SEV context has been moved.
        """
        if attempt.has_run or self._ledger.record.moving or not self._process.alive:
            return False
        return attempt.destination is None or await attempt.destination.wait(_EXIT)

    async def _undo(self, attempt: TransitAttempt, reason: str) -> None:
        """Something has failed. A guest that is in the destination all the same stays there."""
        if not await self._is_there(attempt):
            await self._back(attempt, reason)
            return
        self._ledger.record.note = reason
        process = attempt.destination
        if self._ledger.record.moving and not attempt.has_run and (process is None or not process.alive):
            await self._lost(attempt, reason)
        else:
            await self._arrived(attempt)

    async def _lost(self, attempt: TransitAttempt, reason: str) -> None:
        """The destination has exited with the guest, which has not run there."""
        self._decided = True
        self._ledger.attempt = None
        await self._ended(End(f"{reason}; its SEV context had been moved to the new QEMU, which has exited", ""))
        attempt.close()

    async def _arrived(self, attempt: TransitAttempt) -> None:
        """The guest is the destination's: end the transit."""
        self._decided = self.arrived = True
        self._process.kill()
        process = attempt.destination
        if process is not None and process.alive:
            process.thaw()
            # Nothing happens if it was released already.
            try:
                async with await destination.reach(process, self._config, self._paths) as monitor:
                    if not self._ledger.record.committed:
                        vm, deadline = self._handles.source_vm_fd, self._config.move_deadline
                        await transit_move.complete(monitor, process, vm, deadline)
                    await adopt.finish(monitor)
            except SevhopError as err:
                log.info("the new QEMU: %s", err)
        await self._process.wait(self._config.step_timeout)
        self._ledger.attempt = None
        await self._restored()
        attempt.close()

    async def _back(self, attempt: TransitAttempt, reason: str) -> None:
        """The guest is the transit's: end the destination, and see that the guest runs."""
        log.info("back to the transit: %s", reason)
        self._decided = True
        self._ledger.record.reason, self._ledger.record.committed = reason, False
        if attempt.destination is not None:
            attempt.destination.kill()
            # The transit must not run the guest as long as the other QEMU might.
            while not await attempt.destination.wait(self._config.step_timeout):
                log.warning("the new QEMU (process %d) was killed and has not exited", attempt.destination.pid)
        while self._process.alive:
            self._process.thaw()
            try:
                await self._resume()
                break
            except SevhopError as err:
                log.info("the transit does not run the guest: %s", err)
                await asyncio.sleep(_POLL)
        asks = attempt.announced and not attempt.ended_by_us
        by_client = asks and await self._watch.destroyed_by_client(self._config)
        self._ledger.attempt = None
        self._ledger.enter(TransitState.TRANSIT)
        attempt.close()
        if by_client:
            await self._ended(End("a client has destroyed the domain", "destroy"))

    async def _resume(self) -> None:
        """What a hop that was interrupted has stopped, runs again; what else has stopped the guest stays as it is."""
        monitor = await self._watch.connected()
        if self._ledger.record.state is TransitState.HOPPING:
            status = await adopt.adopt_status(monitor)
            protected_state.restore(self._process, status.protected_state_offset)
            await monitor.remove_fds()
            await resume_source(monitor, running=not self._ledger.record.was_paused)
