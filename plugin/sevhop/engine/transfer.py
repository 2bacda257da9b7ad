"""
The phases of a hop in which the guest is stopped and all of it goes over: stop, map, save, load.

All of this is downtime. Nothing is queried here that could have been queried before.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
from typing import NamedTuple

from sevhop_qmp.errors import MonitorClosed, SevhopError, StateError
from sevhop_qmp.monitor import Commands
from sevhop_qmp.thread_states import ThreadStates

from ..cancellation import shielded
from ..disks import block_graph
from ..errors import GuestState, RecoveryRequired
from ..guest import inspection, runtime_settings
from ..options import HopOptions
from ..process import scheduling
from . import protected_state, stopped_guest
from .check import Checked
from .prepare import Prepared
from .realtime import Boost
from .stopped_guest import LOCKED_HINT, halt, resume_guest, verify_stopped
from .transaction import Transaction


class Stopped(NamedTuple):
    """
    The guest does not run. See :func:`stop`.

    :ivar threads: the states of the source's threads.
    :ivar boost: who has a realtime priority meanwhile.
    """

    threads: ThreadStates
    boost: Boost


async def stop(hop: Transaction, checked: Checked, prepared: Prepared) -> Stopped:
    """
    Stop the source, which begins to save its state. A guest that was paused is verified to be.

    :raises SevhopError: it is not what it was when it was checked.
    """
    await verify_unchanged(checked, prepared)
    return await stop_verified(hop, checked, prepared)


async def stop_verified(hop: Transaction, checked: Checked, prepared: Prepared) -> Stopped:
    """
    The same for a source that was verified by the caller.

    :raises SevhopError: it is not stopped.
    """
    hop.record(stopped=checked.was_running)
    source, destination = checked.source, prepared.started.destination.process
    threads = source.threads
    states = hop.resources.enter_context(source.thread_states())
    boost = hop.resources.enter_context(Boost([*threads, *destination.threads]))
    hop.rollback.push(lambda: _resume_source(hop, checked, prepared, boost))
    prepared.ram.sync()  # once more, so that little is left, and the caches are warm
    gc.freeze()  # the collector does not visit these objects again during the downtime
    readers = set(threads) - checked.guest.vcpu_threads
    # Not all threads of the destination: one may still be busy with its start, and would delay the guest now.
    boost.destination([destination.pid, *prepared.guest.vcpu_threads])
    boost.source([source.pid])
    checked.watch.stopping()
    protected_state.clear(hop, prepared.flag)
    if checked.was_running:
        hop.downtime_begins()
        if checked.monitor.in_order:
            # By then the guest is stopped, and a thread of the source reads the order to save. It goes before us.
            with checked.monitor.on_first_data(lambda: boost.source(readers)):
                stopped = asyncio.ensure_future(checked.monitor.execute("stop"))
                # QEMU runs commands in their order, so this one need not wait for the answer.
                prepared.transfer.begin()
                boost.ourselves()
                await stopped
        else:
            # Shielded, so that it cannot be executed after what resumes the guest.
            await shielded(checked.monitor.execute("stop"))
            boost.source(readers)
            prepared.transfer.begin()
            boost.ourselves()
    else:
        await verify_stopped(checked.monitor)
        boost.source(readers)
        prepared.transfer.begin()
    boost.source(checked.guest.vcpu_threads)
    return Stopped(states, boost)


async def verify_unchanged(checked: Checked, prepared: Prepared) -> None:
    """
    Others may have changed the guest while the destination was started.

    :raises SevhopError: they have.
    """
    await inspection.verify_unchanged(checked.monitor, checked.guest)
    now = await runtime_settings.read(checked.monitor, checked.source)
    if found := runtime_settings.changes(prepared.settings, now):
        raise SevhopError(f"{found} of the guest was changed by another client", "try again")
    if lost := scheduling.hand_over(*prepared.roles):
        raise SevhopError("; ".join(lost), "try again")
    await prepared.disks.verify_unchanged(checked.monitor)
    await checked.watch.verify_undisturbed()


async def _resume_source(hop: Transaction, checked: Checked, prepared: Prepared, boost: Boost) -> None:
    """
    Undo the stop: the destination is terminated first, so that at no moment two QEMUs may run the guest.

    :raises RecoveryRequired: the guest does not run again.
    """
    await prepared.terminate_destination()
    if not checked.source.alive:
        return
    checked.source.thaw()
    try:
        await _resume_stopped_source(hop, checked, prepared, boost)
    except SevhopError as err:
        # A QEMU that exits has hung up before. Then the guest ended as without a hop.
        if isinstance(err, MonitorClosed) and await checked.source.wait(stopped_guest.EXIT_PATIENCE):
            return
        raise RecoveryRequired(f"rollback failed: {err.message}", err.hint, GuestState.PAUSED_IN_OLD) from err


async def _resume_stopped_source(hop: Transaction, checked: Checked, prepared: Prepared, boost: Boost) -> None:
    monitor, disks = checked.monitor, prepared.disks
    saved = await prepared.transfer.abandon()
    boost.reset()
    if hop.downtime.began:
        # The answer to this comes after all that our order to stop has caused, however late that was executed.
        await monitor.execute("query-status", timeout=max(stopped_guest.CONT_DEADLINE, monitor.timeout))
    if hop.downtime.began and await checked.watch.stopped_by_us():
        await resume_guest(monitor)
        await _report_jobs(hop, monitor)
    elif saved:
        # It has given up its images, but the guest is not ours to resume.
        await block_graph.activate(monitor)
        hop.downtime.disown()
    if disks.spares_given_up:
        await block_graph.activate(monitor)
    if saved:
        for text in await disks.lost_bitmaps(monitor):
            hop.note(text)


async def _report_jobs(hop: Transaction, monitor: Commands) -> None:
    """Others found a paused guest when they began while it was stopped, and libvirt leaves it paused in the end."""
    with contextlib.suppress(SevhopError):
        for job in await inspection.jobs(monitor):
            hop.note(f"another client's job began while the guest was stopped ({job}): resume it if it is paused then")


async def map_memory(prepared: Prepared) -> None:
    """Have the destination map the guest's memory, and sync private RAM blocks. The source saves meanwhile."""
    prepared.transfer.send_first_byte()
    prepared.ram.sync()


async def save(prepared: Prepared) -> None:
    """
    Forward the device state to the destination as the source writes it.

    :raises StateError, MonitorError: the source cannot save, or has exited.
    """
    await prepared.transfer.forward()


async def load(hop: Transaction, options: HopOptions, checked: Checked, prepared: Prepared, stopped: Stopped) -> None:
    """
    Halt the source (SIGSTOP), and have the destination load everything. With autostart this is the commit point:
    the destination reports the start to the keeper right before, which can refuse it.

    :raises SevhopError: somebody has resumed the source, it keeps a disk, or the destination cannot load the state.
    """
    keeper = prepared.started.keeper
    await hand_over(hop, options, checked, prepared, stopped)
    if checked.autostart:
        if not keeper.runs.is_set() and not keeper.revoke_start():
            # QEMU stays paused if it cannot activate the disk images, and reports that only in its log.
            why = " ".join(prepared.started.destination.log_lines()[-2:]) or "QEMU gives no reason"
            raise StateError(f"the new QEMU cannot start the guest: {why}", LOCKED_HINT)
        hop.commit(GuestState.RUNNING_IN_NEW)
    hop.record(loaded=True)


async def hand_over(
    hop: Transaction, options: HopOptions, checked: Checked, prepared: Prepared, stopped: Stopped
) -> None:
    """
    Halt the source (SIGSTOP), and have the destination load everything. With autostart it may run the guest then.

    :raises SevhopError: somebody has resumed the source, it keeps a disk, or the destination cannot load the state.
    """
    transfer = prepared.transfer
    # The destination loads the state meanwhile. A halted source cannot be asked about its disks any more.
    await prepared.disks.verify_given_up(
        checked.monitor, again=not hop.downtime.began, verify_stopped=lambda: verify_not_resumed(hop, checked)
    )
    await _halt_source(hop, options, checked, prepared, stopped)
    # It has reported all that was done to it until then.
    await verify_not_resumed(hop, checked)
    if not checked.monitor.in_order:
        prepared.disks.verify_not_resumed()  # unless the report is still on its way to libvirt
    await transfer.end()
    if checked.autostart:
        # The rest is done by the destination. We would only compete with the guest's vCPUs.
        stopped.boost.reset_ourselves()
    await transfer.until_loaded(prepared.started.keeper.runs)


async def _halt_source(
    hop: Transaction, options: HopOptions, checked: Checked, prepared: Prepared, stopped: Stopped
) -> None:
    """It has saved everything. From here on it executes nothing, whatever command it gets on any monitor."""
    source = checked.source

    async def hang_up_if_halted() -> None:
        if source.frozen:
            await checked.monitor.close()  # nobody should wait for an answer that never comes

    hop.resources.push_async_callback(hang_up_if_halted)
    source.halt()
    await prepared.disks.verify_unchanged_when_stopped()  # its threads stop meanwhile
    await halt(source, options.step_timeout, stopped.threads)


async def verify_not_resumed(hop: Transaction, checked: Checked) -> None:
    """:raises SevhopError: the guest has run in the source since the hop stopped it, or was changed."""
    await checked.watch.verify_stopped(was_running=hop.downtime.began)
