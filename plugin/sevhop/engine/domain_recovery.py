"""
Recover for a domain of libvirt: see :mod:`sevhop.engine.recovery`.

===================================  =========================================================================
its old QEMU is alive                it is resumed there, and the keeper is released
the guest is in the keeper           the domain is restored from the image, in the new emulator, or the old
somebody restores it                 that is waited for
it was hopping into a transit        see :mod:`sevhop.engine.first_hop_recovery`
it runs in the transit               see :mod:`sevhop.engine.transit_recovery`
it runs in the new QEMU              the persistent definition gets the new emulator
it ran there, and that QEMU exited   the guest is reported as gone
neither a QEMU nor a keeper          the guest is reported as gone, or as saved if another client has saved it
===================================  =========================================================================

The domain is identified by the UUID in the journal, not by its name. A QEMU that this hop did not start is never
terminated: if one runs the domain while its guest is suspended in the keeper, manual action is required.
"""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import QemuProcess

from ..checks import chosen_emulator
from ..disks import block_graph, unchanged_images
from ..errors import LOST_HINT, SAVED_HINT, GuestState, RecoveryRequired, Refused
from ..guest import saved_settings
from ..keeper.client import KeeperClient
from ..keeper.config import KeeperError, KeeperTimeout
from ..keeper.state import State
from ..libvirt import domain_xml
from ..libvirt.connection import Connection
from ..libvirt.daemon import DomainError
from ..libvirt.domain import Domain
from ..options import RecoverOptions
from ..process import apparmor_profile
from ..records import run_directory
from ..records.hop_record import PREPARED, HopRecord
from ..records.journal import Journal
from . import first_hop_recovery, guest_clock, protected_state, transit_recovery, way_back
from .recovery_result import RecoveredGuest, RecoveryOutcome, stopped_until_now
from .stopped_guest import STOPPED
from .suspended_guest import verify_age, verify_images
from .upgrade_restore import define_emulator, end_hanging_destination, not_defined, start_destination
from .upgrade_save import resume_hint

#: Seconds for what is in progress on a domain that nobody has named, such as a slow restore by another client.
_UNNAMED_PATIENCE = 60.0
_POLL = 0.05
_NOT_WAITING = "the guest does not wait for libvirt in the transit or the keeper, so no other emulator is of use"


async def settle(journal: Journal, *, named: bool, options: RecoverOptions) -> RecoveredGuest:
    """
    Finish the hop of a domain, or roll it back.

    :param journal: of the hop; ours.
    :param named: whether the caller has named this domain. An upgrade that was prepared on purpose waits for that.
    :param options: ``step_timeout`` is also for what is in progress, such as a restore by another client.
    :raises SevhopError: that is not possible now; nothing of the guest is lost.
    """
    record = journal.record
    connection = await Connection.open(record.uri, options.step_timeout)
    try:
        recovered = await _settle(journal, connection, named, options)
        if recovered.result is not RecoveryOutcome.IN_PROGRESS:
            await way_back.forget_unused(connection, record.uuid)
        clock = await guest_clock.settle(connection, record.uuid, recovered.stopped_ms, set_time=options.set_time)
        return replace(recovered, clock=clock)
    finally:
        connection.close()


def _paused_in_source(record: HopRecord) -> bool:
    """
    Whether the guest was paused all the time, and the transit that had it has exited: the old QEMU, halted, has all of
    it as well, unless it has run in the transit.
    """
    assert record.transit is not None
    return not record.running and record.source.exists and not record.transit.exists


async def _settle(journal: Journal, connection: Connection, named: bool, options: RecoverOptions) -> RecoveredGuest:
    record, timeout = journal.record, options.step_timeout
    if record.transit is not None:
        if options.emulator is not None:
            await chosen_emulator.verify_for_transit(record, connection, options.emulator)
        if not record.committed or _paused_in_source(record):
            recovered = await first_hop_recovery.settle(record, connection, timeout=timeout)
            if recovered.result is not RecoveryOutcome.DESTINATION:
                return recovered
            # Whoever recovers it after us must not take the exit of the transit for that of the guest.
            journal.write({"committed": True, "stopped_ms": recovered.stopped_ms or record.stopped_ms})
        return await transit_recovery.settle(journal, connection, named=named, options=options)
    # It was loaded for a transit that was not started.
    await asyncio.to_thread(apparmor_profile.remove, record.apparmor_profile)
    keeper = await _keeper(record, timeout)
    source = record.source.open()
    try:
        if options.emulator is not None:
            if keeper is None or source is not None:
                raise Refused(_NOT_WAITING, "recover it without --emulator")
            await chosen_emulator.verify_for_image(record, connection, keeper.image, options.emulator)
        interrupted = InterruptedUpgrade(record, connection, keeper, source, journal.write, options)
        return await interrupted.settle(named)
    finally:
        if keeper is not None:
            keeper.close()
        if source is not None:
            source.close()


async def _keeper(record: HopRecord, timeout: float) -> KeeperClient | None:
    directory = Path(record.directory) if record.directory else run_directory.hop_of(record.guest)
    if directory is None:
        return None
    try:
        keeper = await KeeperClient.connect(directory)
    except KeeperError:
        return None
    keeper.timeout = timeout
    try:
        if (await keeper.status())["uuid"] == record.uuid:
            return keeper
    except KeeperTimeout:
        # It hangs, and has the guest.
        keeper.close()
        raise
    except KeeperError:
        pass
    keeper.close()
    return None


class InterruptedUpgrade:
    """An upgrade that was interrupted."""

    def __init__(
        self,
        record: HopRecord,
        connection: Connection,
        keeper: KeeperClient | None,
        source: QemuProcess | None,
        write: Callable[[dict[str, Any]], None] = lambda fields: None,
        options: RecoverOptions = RecoverOptions(),
    ) -> None:
        """:param write: appends to the journal."""
        self._record = record
        self._connection = connection
        self._keeper = keeper
        self._source = source
        self._write = write
        self._options = options

    async def settle(self, named: bool) -> RecoveredGuest:
        """:raises SevhopError: see :func:`settle`."""
        state = await self._settled(named)
        if self._source is not None and state in (State.HELD, None):
            return await self.rollback(self._record, self._source)
        if state is State.WAITING and self._record.phase == PREPARED and not named:
            return RecoveredGuest(
                self._record.guest,
                RecoveryOutcome.IN_PROGRESS,
                f"suspended in the keeper; resume it with: virsh restore {self._required_keeper().image}, or"
                f" sevhop recover {shlex.quote(self._record.guest)}",
            )
        if state is State.WAITING:
            return await self._restore()
        if state is State.OVER:
            return await self.finish(self._record)
        if state is State.LOST:
            await self._release_keeper()
            return RecoveredGuest(
                self._record.guest, RecoveryOutcome.GONE, f"it ran in the new QEMU, which has exited; {LOST_HINT}"
            )
        return await self._without_keeper()

    async def _settled(self, named: bool) -> State | None:
        """
        The state of the keeper, when nothing is in progress any more; None without a keeper. A destination that does
        not run in time is ended.
        """
        if self._keeper is None:
            return None
        patience = self._keeper.timeout if named else max(self._keeper.timeout, _UNNAMED_PATIENCE)
        deadline = time.monotonic() + patience
        while True:
            try:
                status = await self._keeper.status()
            except KeeperTimeout:
                raise
            except KeeperError:
                self._keeper = None
                return None
            state = State(status["state"])
            if state is State.RESTORING and not await self._active():
                # Its last restore has failed, and may be retried.
                return State.WAITING
            if state not in (State.RETIRING, State.RESTORING, State.COMMITTED):
                return state
            if state is State.COMMITTED and not self._record.running:
                return State.OVER  # the guest stays paused
            if time.monotonic() > deadline:
                if state is State.RESTORING:
                    await end_hanging_destination(self._connection, self._record.uuid, self._keeper)
                    return State((await self._keeper.status())["state"])
                raise RecoveryRequired(
                    f'keeper stuck in state "{state.value}" for {patience:g} s',
                    "see virsh list; then run sevhop recover again",
                )
            await asyncio.sleep(_POLL)

    def _required_keeper(self) -> KeeperClient:
        assert self._keeper is not None
        return self._keeper

    async def _domain(self) -> Domain:
        domain = await self._connection.domain_with(self._record.uuid)
        if domain is None:
            raise SevhopError(f"libvirt knows no domain with UUID {self._record.uuid}", "see virsh list --all")
        return domain

    async def _active(self) -> Domain | None:
        """The domain, if it is active in libvirt."""
        domain = await self._connection.domain_with(self._record.uuid)
        return domain if domain is not None and await domain.active() else None

    async def _verify_not_started_by_another(self) -> None:
        """:raises RecoveryRequired: the domain has a QEMU that this hop did not start."""
        domain = await self._active()
        if domain is None:
            return
        try:
            pid = domain.living_pid()
        except DomainError as err:
            if await self._active() is None:
                return  # it has just exited
            raise RecoveryRequired(
                f"domain {domain.name} is active while its guest is suspended in the keeper: {err.message}",
                "see virsh list; then run sevhop recover again",
            ) from err
        if pid is not None and not self._required_keeper().has_started(pid):
            raise RecoveryRequired(
                f"another client runs domain {domain.name} (process {pid}) while its guest is suspended in the keeper",
                f"decide which of the two to keep: for the guest in the keeper, run virsh destroy "
                f"{shlex.quote(domain.name)}, then sevhop recover {shlex.quote(self._record.guest)}",
            )
        # A destination that failed, or that has exited unnoticed by libvirt; not one that is about to run the guest.
        await self._required_keeper().revoke()
        await domain.destroy()

    async def rollback(self, record: HopRecord, source: QemuProcess) -> RecoveredGuest:
        """
        The guest is in its old QEMU: resume it, and release the keeper.

        :raises SevhopError: it cannot be resumed.
        """
        source.thaw()  # a keeper that was killed may have left it halted
        protected_state.restore(source, record.protected_state)
        domain = await self._domain()
        if domain.living_pid() != source.pid:
            raise RecoveryRequired(
                f"its old QEMU (process {source.pid}) is alive, but libvirt has another one for domain {domain.name}",
                "find out which of the two has the guest",
            )
        monitor = await domain.monitor()
        await protected_state.set_reboot_action(monitor, record.reboot_action)
        status = await monitor.execute("query-status")
        # One that has shut down since, had an I/O error, or was paused by another client, stays as it is.
        stopped_ms = None
        ours = status["running"] or (status["status"] in STOPPED and record.stopped)
        if record.running and ours and not await domain.running():
            await domain.resume()
            stopped_ms = stopped_until_now(record)
        elif not status["running"]:
            await block_graph.activate(monitor)
        await block_graph.activate_spares(monitor)
        with contextlib.suppress(SevhopError):
            await monitor.remove_fds()
        await self._release_keeper()
        return RecoveredGuest(record.guest, RecoveryOutcome.SOURCE, stopped_ms=stopped_ms)

    async def _restore(self) -> RecoveredGuest:
        keeper, options = self._required_keeper(), self._options
        verify_age(self._record, options)
        verify_images(self._record, await keeper.status())
        await self._verify_not_started_by_another()
        if options.emulator is not None:
            self._write({"new": options.emulator})
            self._record = replace(self._record, new=options.emulator)
            await keeper.use(options.emulator)
        try:
            await start_destination(self._connection, self._record.uuid, keeper)
        except SevhopError as err:
            reason = (await keeper.status())["reason"] or err.message
            if options.emulator is not None:
                self._record_images()
                raise RecoveryRequired(reason, resume_hint(self._record.guest, keeper), GuestState.SUSPENDED) from err
            await keeper.use(self._record.kept or self._record.old)
            try:
                await start_destination(self._connection, self._record.uuid, keeper)
            except SevhopError as again:
                self._record_images()
                raise RecoveryRequired(
                    f"{reason}; in the old emulator: {again.message}",
                    resume_hint(self._record.guest, keeper),
                    GuestState.SUSPENDED,
                ) from again
            stopped_ms = stopped_until_now(self._record)
            text = "; ".join([f"in a new process, since {reason}", *await self._finish_settings()])
            await self._activate_images()
            await self._release_keeper()
            return RecoveredGuest(self._record.guest, RecoveryOutcome.SOURCE, text, stopped_ms)
        stopped_ms = stopped_until_now(self._record)
        return replace(await self.finish(self._record), stopped_ms=stopped_ms)

    def _record_images(self) -> None:
        """The QEMUs that have failed may have written to them."""
        with contextlib.suppress(SevhopError):
            images = unchanged_images.recorded(self._record.images)
            self._write({"images": images, "images_at": time.monotonic()})

    async def finish(self, record: HopRecord) -> RecoveredGuest:
        """The guest is in its new QEMU: what is left of the phases restore and define."""
        try:
            note = await define_emulator(self._connection, record.uuid, record.old, record.new)
        except (SevhopError, domain_xml.DomainXmlError) as err:
            note = not_defined(record.guest, err)
        notes = await self._finish_settings()
        await self._activate_images()
        await self._release_keeper()
        return RecoveredGuest(record.guest, RecoveryOutcome.DESTINATION, "; ".join(filter(None, [note, *notes])))

    async def _activate_images(self) -> None:
        """Activate the images of a paused guest. If that fails, they are activated when it is resumed."""
        if not self._record.running:
            with contextlib.suppress(SevhopError):
                await block_graph.activate(await (await self._domain()).monitor())

    async def _finish_settings(self) -> list[str]:
        """See :func:`.saved_settings.finish`. :return: notes, the keeper's among them."""
        if self._keeper is None:
            return []
        try:
            domain = await self._domain()
            monitor, pid = await domain.monitor(), domain.pid()
        except SevhopError as err:
            return [f"cannot verify the run-time settings: {err.message}"]
        notes = await saved_settings.finish(self._keeper.directory, monitor, pid)
        with contextlib.suppress(KeeperError):
            notes += filter(None, [(await self._keeper.status())["note"]])
        return notes

    async def _without_keeper(self) -> RecoveredGuest:
        """Its old QEMU has exited, and there is no keeper."""
        domain = await self._active()
        if domain is None and await self._saved_by_another():
            return RecoveredGuest(self._record.guest, RecoveryOutcome.SAVED, SAVED_HINT)
        if domain is None:
            return RecoveredGuest(
                self._record.guest,
                RecoveryOutcome.GONE,
                f"neither a QEMU nor a keeper has its memory; {LOST_HINT}",
            )
        if domain_xml.describe(await domain.xml()).emulator == self._record.new:
            return await self.finish(self._record)
        return RecoveredGuest(self._record.guest, RecoveryOutcome.SOURCE, "in a new process")

    async def _saved_by_another(self) -> bool:
        with contextlib.suppress(SevhopError):
            domain = await self._connection.domain_with(self._record.uuid)
            return domain is not None and await domain.saved()
        return False

    async def _release_keeper(self) -> None:
        if self._keeper is not None:
            await self._keeper.release()
