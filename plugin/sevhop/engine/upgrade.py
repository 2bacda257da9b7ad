"""
The upgrade: replace the QEMU of a running libvirt domain, which keeps its name, UUID, devices and XML.

::

    check      nothing is touched: can this guest hop, to this emulator, on this host?
               The program of the source is kept, if its path has another one now (:mod:`sevhop.engine.way_back`)
    acquire    a keeper process takes the source's VM and memory                     undo: release it
    rehearse   the new emulator loads a copy of the device state (:mod:`sevhop.engine.rehearsal`)
    prepare    libvirt learns the new emulator; the source is given a file to save to
    stop       source suspended, and verified to be stopped                          undo: resume it
    save       device state into a save image, private RAM blocks to the keeper      undo: resume it
    terminate  the source's QEMU exits: the guest is suspended in the keeper         undo: restore in the old emulator
    restore    libvirt starts the destination from the image; before it resumes the guest, it calls our hook, and
               the keeper copies the private RAM blocks and moves the SEV context    COMMIT
    define     the persistent definition gets the new emulator

That is the way without a transit; the other one is in :mod:`sevhop.engine.upgrade_transit`.

libvirt cannot have two domains of one UUID, so the source exits before the destination starts. If the restore fails,
the guest is restored in the old emulator in the same way. If that fails as well, the guest is still suspended in the
keeper, and ``virsh restore`` of the image resumes it.
"""

from __future__ import annotations

import contextlib

from sevhop_qmp.errors import SevhopError

from ..errors import GuestLost, GuestState, RecoveryRequired, RolledBack
from ..events import Listener, ignore
from ..keeper.client import KeeperClient
from ..options import UpgradeOptions
from ..records.hop_record import PREPARED
from . import guest_clock, upgrade_transit, way_back
from .transaction import Transaction
from .transit_hop import TransitHop
from .upgrade_prepare import (
    CheckedDomain,
    PreparedDomain,
    acquire,
    check,
    prepare,
    rehearse,
)
from .upgrade_restore import define, restore
from .upgrade_save import StoppedDomain, record_images, save, stop, terminate
from .way_back import WayBack


class Upgrade(Transaction):
    """The upgrade of one domain."""

    def __init__(self, uri: str, name: str, options: UpgradeOptions | None = None, listener: Listener = ignore) -> None:
        super().__init__(name, listener)
        self.report.kind = "domain"
        self._uri = uri
        self._name = name
        self._options = options or UpgradeOptions()
        self._first: TransitHop | None = None

    def _outcome(self) -> str:
        return "prepared" if self.report.image else "checked" if self._options.dry_run else "done"

    async def _script(self) -> None:
        options = self._options
        checked = await self.run_phase("check", check(self, self._uri, self._name, options))
        if options.dry_run:
            return
        self.resources.push_async_callback(self._settle_clock, checked)
        back = await way_back.prepare(self, checked.connection, checked.source, checked.xml, checked.monitor.version)
        if not (options.transit and await self._by_transit(checked, back)):
            await self._by_image(checked, back)

    async def _settle_clock(self, checked: CheckedDomain) -> None:
        """At the end, wherever the guest runs then: in the new QEMU, or in the old one again."""
        work = guest_clock.settle(
            checked.connection, checked.domain.uuid, self.report.stopped_ms, set_time=self._options.set_time
        )
        self.report.clock = await self.uncancelled(work)

    def interrupt(self) -> bool:
        """See :meth:`.transaction.Transaction.interrupt`."""
        return super().interrupt() if self._first is None else self._first.interrupt()

    async def _by_transit(self, checked: CheckedDomain, back: WayBack) -> bool:
        """
        Two hops, with libvirt's restart between them.

        :return: False if a transit cannot carry the domain.
        """
        options = self._options
        first = upgrade_transit.first_hop(self, options, checked)
        self._first = first.hop
        try:
            if not await upgrade_transit.enter_transit(self, checked, first):
                return False
        finally:
            self._first = None
        # The guest runs. What libvirt does not do within a step is left to a later attempt.
        checked.connection.timeout = min(checked.connection.timeout, options.step_timeout)
        kept = await self.run_phase("keep", upgrade_transit.keep(self, options, checked, back, first))
        await self.run_phase("retire", upgrade_transit.leave_libvirt(self, options, checked, kept.transit.process))
        if options.prepare_only:
            self._leave_prepared(kept.keeper)
            self.report.in_transit = True
            return True
        restored = await self.run_phase("restore", upgrade_transit.restore(self, checked, kept))
        running = True
        with contextlib.suppress(SevhopError):
            await checked.domain.reconnect()
            running = await checked.domain.running()
        self.committed_state = GuestState.RUNNING_IN_NEW if running else GuestState.PAUSED_IN_NEW
        if restored.failure:
            state = GuestState.RUNNING_IN_OLD if running else GuestState.PAUSED_IN_OLD
            raise RolledBack(f"restore: {restored.failure}", guest_state=state)
        await way_back.forget_unused(checked.connection, checked.domain.uuid)
        return True

    def _leave_prepared(self, keeper: KeeperClient) -> None:
        self.report.image = keeper.image
        self.record(phase=PREPARED)
        self.unfinished = True

    async def _by_image(self, checked: CheckedDomain, back: WayBack) -> None:
        """The guest is suspended in the keeper while libvirt restarts; its device state is in a save image."""
        options = self._options
        keeper = await self.run_phase("acquire", acquire(self, options, checked))
        rehearsed = False
        if options.rehearse:
            rehearsed = await self.run_phase("rehearse", rehearse(self, options, checked, keeper, back))
        if back.blocker:
            self.note(f"cannot roll back to the old emulator: {back.blocker}")
        prepared = await self.run_phase("prepare", prepare(self, checked, keeper, rehearsed=rehearsed))
        # From here on the guest waits for whoever does not reply.
        checked.connection.timeout = keeper.timeout = options.step_timeout
        stopped = await self.run_phase("stop", stop(self, checked, prepared))
        await self.run_phase("save", save(options, checked, keeper, prepared, stopped))
        await self.run_phase("terminate", terminate(self, options, checked, keeper, prepared, stopped))
        if options.prepare_only:
            self._leave_prepared(keeper)
            return
        try:
            await self.run_phase("restore", restore(self, checked, keeper, prepared, stopped))
        except GuestLost:
            await self.uncancelled(keeper.release())
            raise
        except SevhopError as err:
            await self.uncancelled(self._restore_old_emulator(err, checked, keeper, back, prepared, stopped))
        self.committed_state = GuestState.RUNNING_IN_NEW if stopped.was_running else GuestState.PAUSED_IN_NEW
        self.committed_hint = ""
        await self.run_phase("define", define(self, checked, keeper))

    async def _restore_old_emulator(
        self,
        failure: SevhopError,
        checked: CheckedDomain,
        keeper: KeeperClient,
        back: WayBack,
        prepared: PreparedDomain,
        stopped: StoppedDomain,
    ) -> None:
        """
        The destination failed: restore the guest in the old emulator.

        :raises RolledBack: it runs there.
        :raises RecoveryRequired: it does not, but is suspended in the keeper.
        """
        try:
            await keeper.use(back.emulator)
            await restore(self, checked, keeper, prepared, stopped)
        except GuestLost:
            await keeper.release()
            raise
        except SevhopError as err:
            record_images(self, checked, keeper)  # the QEMUs that have failed may have written to them
            raise RecoveryRequired(
                f"{self.phase}: {failure.message}; in the old emulator: {err.message}",
                self.committed_hint,
                GuestState.SUSPENDED,
            ) from failure
        await keeper.release()
        state = GuestState.RUNNING_IN_OLD if stopped.was_running else GuestState.PAUSED_IN_OLD
        where = f"; it was restored in another program, which {back.emulator} is now" if back.blocker else ""
        raise RolledBack(f"{self.phase}: {failure.message}{where}", failure.hint, state) from failure
