"""The phases of an upgrade in which the guest leaves its old QEMU: stop, save, terminate."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from sevhop_qmp import adopt_library, selinux, stream_sockets
from sevhop_qmp.errors import SevhopError, StateError
from sevhop_qmp.monitor import Commands, Monitor

from ..cancellation import shielded
from ..checks import guest as guest_checks
from ..disks import block_graph, unchanged_images
from ..errors import GuestState, RecoveryRequired
from ..keeper.client import KeeperClient
from ..keeper.config import KeeperError, KeeperTimeout
from ..keeper.state import State
from ..libvirt import domain_xml, hook, lock_manager
from ..libvirt.daemon import DomainError
from ..libvirt.save_image import SaveImage
from ..options import UpgradeOptions
from . import protected_state
from .retire import LIBVIRT_MONITOR, clean_up, libvirt_kept_connected
from .stopped_guest import verify_stopped
from .transaction import Transaction
from .upgrade_prepare import CheckedDomain, PreparedDomain

log = logging.getLogger(__name__)

#: Seconds until a monitor greets to which no other client is connected.
_GREETING_TIMEOUT = 1.0


@dataclass(frozen=True)
class StoppedDomain:
    """
    The guest does not run. See :func:`stop`.

    :ivar was_running: whether it is to run again.
    :ivar state: the run state that it was stopped in.
    :ivar undo: resumes it.
    """

    was_running: bool
    state: str
    undo: SourceUndo


async def stop(hop: Transaction, checked: CheckedDomain, prepared: PreparedDomain) -> StoppedDomain:
    """
    Suspend the domain. A guest that is paused, also if somebody has paused it since it was checked, stays so.

    :raises SevhopError: it is still running, or something else has stopped it.
    """
    undo = SourceUndo(hop, checked, prepared)
    hop.rollback.push(undo)
    await prepared.disks.verify_unchanged(checked.monitor)
    running = bool((await checked.monitor.execute("query-status"))["running"])
    protected_state.clear(hop, prepared.flag)
    if running:
        hop.record(stopped=True)
        hop.downtime_begins()
        # Shielded, so that it cannot be executed after what resumes the guest.
        await shielded(checked.domain.suspend())
    elif checked.guest.state == "running":
        hop.downtime.disown()
        hop.record(running=False)
    state = await verify_stopped(checked.monitor)
    if state not in guest_checks.HOPPABLE_STATES:
        hop.downtime.disown()
        raise SevhopError(f"the guest is {state}", "a guest can hop while it runs or is paused")
    return StoppedDomain(running, state, undo)


class SourceUndo:
    """
    Undoes :func:`stop` and :func:`save`: the guest runs again in its old QEMU, with its images active.

    :ivar images_given_up: whether the source was ordered to give them up.
    """

    def __init__(self, hop: Transaction, checked: CheckedDomain, prepared: PreparedDomain) -> None:
        self._hop = hop
        self._checked = checked
        self._prepared = prepared
        self.images_given_up = False

    async def __call__(self) -> None:
        """:raises RecoveryRequired: the guest does not run."""
        source, domain, hop = self._checked.source, self._checked.domain, self._hop
        if not source.alive:
            return
        source.thaw()
        try:
            try:
                await domain.reconnect(patience=0)
            except DomainError:
                # libvirt itself has failed, and the guest should not wait for it.
                try:
                    await self._resume_without_libvirt()
                    return
                except SevhopError as err:
                    log.info("%s", err)
                    await domain.reconnect()
            if hop.downtime.began:
                await domain.resume()
            await self._activate_images(self._checked.monitor)
        except SevhopError as err:
            if hop.downtime.began and not await self._runs():
                raise RecoveryRequired(
                    f"cannot resume the guest: {err.message}",
                    "virsh resume {0}, then sevhop recover {0}".format(shlex.quote(domain.name)),
                    GuestState.PAUSED_IN_OLD,
                ) from err
        hop.downtime_ends()

    async def _resume_without_libvirt(self) -> None:
        """
        Its monitor listens, and without a daemon no other client is connected. The next daemon reads the run state
        when it connects.
        """
        hop = self._hop
        async with await Monitor.connect(self._libvirt_monitor(), greeting_timeout=_GREETING_TIMEOUT) as monitor:
            if hop.downtime.began:
                await monitor.execute("cont")
                hop.downtime_ends()
                if lock_manager.in_use():
                    hop.note("libvirt does not hold its leases: virsh suspend and virsh resume acquire them again")
            await self._activate_images(monitor)
            await self._prepared.state.disarm(monitor)

    async def _activate_images(self, source: Commands) -> None:
        """Those of a guest that is not resumed; ``cont`` would activate them."""
        if not self.images_given_up:
            return
        disks = self._prepared.disks
        if disks.spares_given_up or not self._hop.downtime.began:
            await block_graph.activate(source)
        for text in await disks.lost_bitmaps(source):
            self._hop.note(text)

    def _libvirt_monitor(self) -> str:
        """The socket's path, as seen from our mount namespace."""
        source = self._checked.source
        listeners = stream_sockets.listeners(source)
        for fd in listeners.values():
            os.close(fd)
        for _, path, *_ in listeners:
            if path.endswith(f"/{LIBVIRT_MONITOR}"):
                return f"/proc/{source.pid}/root{path}"
        raise SevhopError("the monitor of the old QEMU does not listen")

    async def _runs(self) -> bool:
        with contextlib.suppress(SevhopError):
            return await self._checked.domain.running()
        return False


async def save(
    options: UpgradeOptions,
    checked: CheckedDomain,
    keeper: KeeperClient,
    prepared: PreparedDomain,
    stopped: StoppedDomain,
) -> None:
    """
    Write the device state into the save image, and private RAM blocks to the keeper.

    :raises SevhopError: the source cannot save, or keeps a disk; or the image cannot be written.
    """
    keeping = asyncio.ensure_future(keeper.keep_blocks())
    stopped.undo.images_given_up = True
    try:
        stream = await prepared.state.save(timeout=options.step_timeout)
    finally:
        await asyncio.wait({keeping})
    keeping.result()

    async def verify_still_stopped() -> None:
        await verify_stopped(checked.monitor, stopped.state)

    try:
        await prepared.disks.verify_given_up(
            checked.monitor, again=not stopped.was_running, verify_stopped=verify_still_stopped
        )
    except StateError:
        await verify_still_stopped()  # a running guest gives up nothing
        raise
    environment = adopt_library.environment(keeper.socket) | {hook.IMAGE_MARK: "without RAM"}
    label = selinux.context_in(checked.source.confinement)
    monitor = str(keeper.monitor)
    xml = domain_xml.for_destination(checked.xml, checked.new, environment, monitor, prepared.displays, label)
    try:
        with open(keeper.image, "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            SaveImage(xml, stopped.was_running, stream, prepared.piped).write(file)
    except OSError as err:
        raise SevhopError(f"cannot write the save image: {err.strerror}", "free space in /run, then try again") from err


async def terminate(
    hop: Transaction,
    options: UpgradeOptions,
    checked: CheckedDomain,
    keeper: KeeperClient,
    prepared: PreparedDomain,
    stopped: StoppedDomain,
) -> None:
    """
    Terminate the source. From here on the guest is suspended in the keeper, and nowhere else.

    :raises SevhopError: somebody has resumed or changed the guest since it was saved.
    """
    with libvirt_kept_connected(checked.source) as hang_up:
        try:
            await verify_stopped(checked.monitor, stopped.state)
            await prepared.disks.verify_unchanged_when_stopped()
            # The destination gets the devices and disks that the source had when it was examined.
            if domain_xml.without_additions(await checked.domain.xml()) != checked.xml:
                raise SevhopError("another client has changed the domain", "try again")
        except SevhopError:
            # Everything is saved, so a source that has exited is not needed any more. Unless another client has saved
            # the domain: then there are two images, and theirs is the one to restore.
            if checked.source.alive or await checked.saved_by_another():
                raise
        with hop.committing():
            try:
                await keeper.retire()
            finally:
                if not checked.source.alive:
                    hop.commit(GuestState.SUSPENDED, resume_hint(hop.report.guest, keeper))
                elif await _may_be_killed(keeper):
                    hop.commit(GuestState.UNKNOWN)
        prepared.state.source_ended()
        record_images(hop, checked, keeper)
        # Not every init reaps at once; libvirt would wait for it.
        await checked.source.wait_reaped(options.step_timeout)
        await clean_up(checked.domain, hang_up)


def record_images(hop: Transaction, checked: CheckedDomain, keeper: KeeperClient) -> None:
    """Record the images of a guest that is suspended in the keeper, as they are when no QEMU has them open."""
    paths: list[str | Path] = [*unchanged_images.paths(checked.disks, checked.xml), keeper.image]
    hop.record(images=unchanged_images.recorded(paths), images_at=time.monotonic())


async def _may_be_killed(keeper: KeeperClient) -> bool:
    """Whether the keeper has begun to kill a source that has not exited, or may yet begin."""
    try:
        return bool((await keeper.status())["state"] != State.HELD.value)
    except KeeperTimeout:
        return True
    except KeeperError:
        return False


def resume_hint(name: str, keeper: KeeperClient) -> str:
    """What to do with the guest of a domain, which waits in a keeper because libvirt cannot restore it."""
    return f"when that is corrected, run: sevhop recover {shlex.quote(name)}, or virsh restore {keeper.image}"
