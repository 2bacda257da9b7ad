"""
The phases of a hop in which the guest becomes the destination's: commit and resume.

The commit point, after which there is no rollback: with an SEV context it is one ioctl in the destination
(:mod:`sevhop_qmp.move`), which also makes the source unable to run. Without one it is the destination's report to the
keeper, right before it starts the guest; a destination that starts on its own has committed in the phase load.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from dataclasses import replace

from sevhop_qmp import move, ram_block_sync
from sevhop_qmp.errors import (
    CommandError,
    MonitorError,
    MoveError,
    MoveUncertain,
    ProcessError,
    SevhopError,
    StateError,
)
from sevhop_qmp.run_mark import RunState

from ..disks import block_graph
from ..errors import GuestLost, GuestState, RecoveryRequired
from ..events import MoveAttempted
from ..guest import inspection, reboot, runtime_settings
from ..options import HopOptions
from ..process import scheduling
from .check import Acquired, Checked
from .prepare import Prepared
from .start import PATIENCE, Started, start_destination
from .stopped_guest import LOCKED_HINT, resume_guest
from .transaction import CommitState, Transaction
from .transfer import Stopped, verify_not_resumed

#: Errors of a move from a VM that has no context, or none any more.
_NO_CONTEXT = (errno.EINVAL, errno.EIO)


async def commit(
    hop: Transaction, options: HopOptions, checked: Checked, acquired: Acquired, prepared: Prepared, stopped: Stopped
) -> Started:
    """
    Move the SEV context into the destination: the one call after which there is no rollback.

    :return: the destination that has the guest. It is another one if the first one exited during the move.
    :raises MoveError: the kernel refused; the source has the context.
    :raises SevhopError: somebody has resumed the source.
    :raises RecoveryRequired, GuestLost: the context was moved, or may have been, and the destination cannot run.
    """
    if hop.state is CommitState.COMMITTED:
        return prepared.started
    await verify_not_resumed(hop, checked)
    if checked.has_context:
        assert acquired.handles.source_vm_fd is not None
        with hop.committing():
            try:
                hop.report.move = await _move(
                    hop, options, prepared.started, source_vm_fd=acquired.handles.source_vm_fd
                )
            except MoveUncertain as err:
                # The kernel may have moved the context or not, and the retry finds the context in either case.
                hop.commit(GuestState.UNKNOWN)
                stopped.boost.reset_all()
                return await _retry_in_new_destination(hop, options, checked, acquired, prepared, prepared.started, err)
            hop.commit(GuestState.PAUSED_IN_NEW)
    elif not hop.downtime.began:
        hop.commit(GuestState.PAUSED_IN_NEW)  # it stays so
    return prepared.started


async def _move(hop: Transaction, options: HopOptions, started: Started, *, source_vm_fd: int) -> move.MoveReport:
    report = await move.move(
        started.destination.monitor,
        started.destination.process.pid,
        source_vm_fd,
        deadline=options.move_deadline,
        tried=lambda attempt, number: hop.emit(MoveAttempted(hop.named, attempt, number)),
    )
    if report.restore_errno:
        hop.commit(GuestState.PAUSED_IN_NEW)
        reason = f"vCPU registers could not be set: {os.strerror(report.restore_errno)}"
        hop.record(broken=reason)
        raise RecoveryRequired(
            f"the context was moved, but {reason}",
            "the guest cannot run any more: shut it down, start it again, and report this",
            GuestState.PAUSED_IN_NEW,
        )
    return report


async def resume(
    hop: Transaction,
    options: HopOptions,
    checked: Checked,
    acquired: Acquired,
    prepared: Prepared,
    stopped: Stopped,
    started: Started,
) -> Started:
    """
    Start the guest in the destination, if the hop has stopped it.

    :return: the destination in which it runs.
    :raises StateError: a destination without an SEV context does not run it, so nothing was committed.
    """
    destination = started.destination
    if not hop.downtime.began:
        await activate(hop, started, "the disks of the paused guest are activated when it is resumed, not now")
        return started
    if checked.autostart:
        await prepared.transfer.until_reported()
    elif hop.state is not CommitState.COMMITTED:
        await _start_and_commit(hop, started)
    else:
        try:
            await resume_guest(destination.monitor)
        except MonitorError as err:
            await _verify_not_run(checked, prepared, started, err)
            stopped.boost.reset_all()
            started = await _retry_in_new_destination(hop, options, checked, acquired, prepared, started, err)
            await resume_guest(started.destination.monitor)
    stopped.boost.reset()
    hop.downtime_ends()
    hop.committed_state = GuestState.RUNNING_IN_NEW
    return started


async def _start_and_commit(hop: Transaction, started: Started) -> None:
    """Without an SEV context ``cont`` is the commit; the destination's report to the keeper confirms it."""
    await asyncio.sleep(0)  # a pending interruption takes effect now, or is too late
    with hop.committing():  # from here on it must not be terminated: it activates the images
        await started.destination.monitor.execute("cont")
    if not started.keeper.revoke_start():
        raise StateError("the new QEMU cannot start the guest", LOCKED_HINT)
    hop.commit(GuestState.RUNNING_IN_NEW)


async def activate(hop: Transaction, started: Started, otherwise: str) -> None:
    """
    Have the destination activate images that it would not activate on its own.

    :param otherwise: noted if it cannot.
    """
    try:
        await block_graph.activate(started.destination.monitor)
    except SevhopError as err:
        hop.note(f"{otherwise}: {err.message}")


async def _verify_not_run(checked: Checked, prepared: Prepared, started: Started, failure: SevhopError) -> None:
    """
    Verify that the guest has not run in a destination that failed, and cannot any more.

    :raises RecoveryRequired: it has run there, or may have.
    :raises GuestLost: it has run there, and the destination has exited.
    """
    process = started.destination.process
    await process.freeze(PATIENCE)
    if prepared.run_mark.read() is RunState.NOT:
        return
    if process.alive:
        process.thaw()
        raise RecoveryRequired(
            f"{failure.message}; the guest is in the new QEMU (process {process.pid})",
            guest_state=GuestState.RUNNING_IN_NEW,
        )
    checked.source.kill()
    await started.destination.kill()
    raise GuestLost(f"{failure.message}; the guest has run in the new QEMU, which has exited")


async def _retry_in_new_destination(
    hop: Transaction,
    options: HopOptions,
    checked: Checked,
    acquired: Acquired,
    prepared: Prepared,
    failed: Started,
    failure: SevhopError,
) -> Started:
    """
    A destination failed during the move of the context, or after it. Start another one, and move the context there
    from wherever it is. Nobody may be boosted any more: a boost is not the source's own policy, which is handed over.

    :param failed: the destination that failed. Its VM may have the context.
    :raises GuestLost: the new one failed as well, and the source has no context any more.
    :raises RecoveryRequired: it failed as well, and the source may have the context.
    :raises SevhopError: the one that failed cannot be killed, and may have the guest.
    """
    assert acquired.handles.source_vm_fd is not None
    hop.note(f"{hop.phase}: {failure.message}; retrying in another process")
    options = replace(
        options,
        step_timeout=max(options.step_timeout, PATIENCE),
        start_timeout=max(options.start_timeout, PATIENCE),
    )
    image = prepared.transfer.image
    started: Started | None = None
    await failed.destination.kill()
    try:
        started = await start_destination(hop, options, checked, acquired, prepared.arguments, prepared.run_mark)
        monitor, process = started.destination.monitor, started.destination.process
        with contextlib.suppress(CommandError):
            there = await runtime_settings.read(monitor, process)
            wanted = reboot.settings_after_hop(checked.guest, prepared.settings)
            await runtime_settings.carry_over(wanted, there, monitor)
        await _schedule_again(hop, prepared, started)
        theirs = await inspection.inspect(monitor, process)
        pairs = [(copy, theirs.blocks[copy.block.name]) for copy in prepared.ram.copies()]
        await asyncio.to_thread(ram_block_sync.write, pairs, process)
        await started.incoming.write(image)
        started.incoming.end()
        await started.incoming.loaded(timeout=options.step_timeout)
        hop.report.move = await _move_from_either(hop, options, acquired, failed, started)
    except RecoveryRequired:
        raise
    except SevhopError as err:
        if started is not None:
            await started.destination.kill()
        message = f"{failure.message}; another new QEMU failed as well: {err.message}"
        tried = isinstance(err, MoveError) and err.errno in _NO_CONTEXT
        if hop.committed_state is GuestState.UNKNOWN and not tried:
            raise RecoveryRequired(message, guest_state=GuestState.UNKNOWN) from err
        raise GuestLost(message, "start the guest, and report this") from err
    hop.commit(GuestState.PAUSED_IN_NEW)
    return started


async def _move_from_either(
    hop: Transaction, options: HopOptions, acquired: Acquired, failed: Started, started: Started
) -> move.MoveReport:
    """Move the context from the source's VM, or from that of the destination that failed."""
    assert acquired.handles.source_vm_fd is not None
    try:
        return await _move(hop, options, started, source_vm_fd=acquired.handles.source_vm_fd)
    except MoveError as err:
        if err.errno not in _NO_CONTEXT or failed.vm is None:
            raise
        # The source has no context any more: the move had been done.
        return await _move(hop, options, started, source_vm_fd=failed.vm)


async def _schedule_again(hop: Transaction, prepared: Prepared, started: Started) -> None:
    """Schedule the threads of another destination like those of the source, as far as possible."""
    try:
        theirs = await scheduling.Roles.of(started.destination.monitor, started.destination.process)
        lost = scheduling.hand_over(prepared.roles[0], theirs)
    except ProcessError as err:
        lost = [f"cannot read how the old QEMU was scheduled: {err.message}"]
    for text in lost:
        hop.note(text)
