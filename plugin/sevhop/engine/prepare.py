"""
The phase of a hop in which everything is prepared while the guest runs.

Everything that can be done while the guest runs is done here, and everything that can fail early fails here.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import NamedTuple

from sevhop_qmp import ram_blocks
from sevhop_qmp.device_state import OutgoingState
from sevhop_qmp.errors import (
    CommandError,
    MonitorError,
    SevhopError,
)
from sevhop_qmp.protected_state import ProtectedState
from sevhop_qmp.ram_block_sync import RamBlockSync
from sevhop_qmp.run_mark import RunMark

from ..cancellation import meanwhile
from ..disks.disk_guard import DiskGuard
from ..errors import HopError, Refused
from ..guest import command_line, cpu_features, inspection, plugged_vcpus, reboot, runtime_settings, vm_generation_id
from ..guest.inspection import ENCRYPTED_BLOCKS
from ..options import HopOptions
from ..process import confinement, launch, scheduling, seccomp_filter
from ..process.confinement import Confinement
from . import protected_state
from .check import Acquired, Checked
from .destination import Destination, LaunchContext
from .realtime import Watchdog
from .start import DestinationUndo, Started, explaining_exit, start_destination
from .state_transfer import StateTransfer
from .stopped_guest import restore_oom_score_adj
from .transaction import Transaction


class _Source(NamedTuple):
    """The source as it is while the destination starts. Right before the stop it is verified to be the same."""

    disks: DiskGuard
    features: cpu_features.FeatureWords
    settings: runtime_settings.Settings


class Prepared(NamedTuple):
    """
    All that is needed to stop the guest. See :func:`prepare`.

    :ivar guest: as the destination has it.
    :ivar disks: guards those of the source.
    :ivar ram: keeps the RAM blocks of the destination that are not shared equal to those of the source.
    :ivar settings: of the source, made since its start.
    :ivar roles: how the threads of source and destination are scheduled.
    :ivar flag: of the source, which is cleared for the time of the stop; None if it need not be.
    """

    started: Started
    arguments: command_line.Derived
    run_mark: RunMark
    guest: inspection.Guest
    disks: DiskGuard
    ram: RamBlockSync
    settings: runtime_settings.Settings
    roles: tuple[scheduling.Roles, scheduling.Roles]
    transfer: StateTransfer
    terminate_destination: DestinationUndo
    flag: ProtectedState | None = None


async def prepare(hop: Transaction, options: HopOptions, checked: Checked, acquired: Acquired) -> Prepared:
    """
    Start the destination, compare it with the source, and copy what can be copied while the guest runs.

    :raises Refused: the destination is not what the guest needs.
    """
    watchdog = Watchdog.start()
    hop.resources.push_async_callback(watchdog.close)
    hop.rollback.push(acquired.guest_paths.discard)
    hop.rollback.push(lambda: restore_oom_score_adj(checked.source, acquired.oom_score_adj))
    launch.protect_from_oom(checked.source.pid)
    await protected_state.forbid_resets(hop, checked.monitor, checked.source, checked.flag)
    run_mark = await _leave_run_mark(hop, checked)
    pinned = await vm_generation_id.pinned(checked.arguments.arguments, checked.monitor)
    arguments = replace(checked.arguments, arguments=pinned)
    async with meanwhile(_read_source(hop, checked)) as read:
        try:
            started = await start_destination(hop, options, checked, acquired, arguments, run_mark)
        except HopError:
            raise
        except SevhopError as err:
            if not (remote := checked.disks.remote()):
                raise
            raise SevhopError(
                f"{err.message}; {remote}, whose server may take one client only",
                err.hint or "allow a second client there for the time of the hop",
            ) from err
        outgoing = OutgoingState(checked.monitor, started.incoming)
        transfer = StateTransfer(outgoing, started.incoming, options.step_timeout)
        hop.resources.callback(transfer.close)
        has_bitmaps = bool(checked.disks.bitmaps())
        undo = DestinationUndo(hop, checked, started, transfer, run_mark, options.step_timeout, has_bitmaps)
        hop.rollback.push(undo)  # before the end of this context, which may be cancelled
    async with explaining_exit(checked, started.destination):
        source = read.result()
        undo.has_bitmaps = bool(source.disks.graph.bitmaps())
        theirs, roles, ram = await _compare(hop, options, checked, acquired, started, source.disks)
        await _copy_settings(hop, options, checked, started, source)
        watchdog.watch(checked.source.pid, started.destination.process.pid)
        await hop.resources.enter_async_context(outgoing)
        identity = acquired.launch_context.credentials
        await outgoing.arm(identity.uid, identity.gid)
        flag = protected_state.open_flag(hop, checked.source, checked.flag)
    return Prepared(
        started, arguments, run_mark, theirs, source.disks, ram, source.settings, roles, transfer, undo, flag
    )


async def _leave_run_mark(hop: Transaction, checked: Checked) -> RunMark:
    """Give the source the mark that records whether the guest has run in the destination; there it outlasts us."""
    run_mark = RunMark.create()
    hop.resources.callback(run_mark.close)
    fdset, _ = await checked.monitor.add_fd(run_mark.fileno())

    async def remove() -> None:
        with contextlib.suppress(MonitorError, CommandError):
            await checked.monitor.execute("remove-fd", {"fdset-id": fdset})

    hop.resources.push_async_callback(remove)
    hop.record(run_mark=run_mark.inode)
    return run_mark


async def _read_source(hop: Transaction, checked: Checked) -> _Source:
    disks = await DiskGuard.open(checked.monitor, checked.source)
    hop.resources.callback(disks.close)
    features = await cpu_features.feature_words(checked.monitor)
    return _Source(disks, features, await runtime_settings.read(checked.monitor, checked.source))


async def _compare(
    hop: Transaction, options: HopOptions, checked: Checked, acquired: Acquired, started: Started, disks: DiskGuard
) -> tuple[inspection.Guest, tuple[scheduling.Roles, scheduling.Roles], RamBlockSync]:
    """Verify that the destination is the same machine, on the same memory, and sync its private RAM blocks."""
    destination = started.destination
    theirs = await inspection.inspect(destination.monitor, destination.process)
    if found := inspection.differences(checked.guest, theirs):
        hint = "give the new QEMU the command line of the old one"
        if vcpus := await plugged_vcpus.missing(checked.monitor, destination.monitor):
            hint += f" after --, and for what was plugged since its start: {' '.join(vcpus)}"
        raise Refused("; ".join(found), hint)
    roles = await _compare_processes(hop, checked, destination, acquired.launch_context)
    # A command line given by the caller, or by libvirt, may name block nodes differently.
    names = not (options.command or checked.transit)
    found = await disks.differences(destination.monitor, destination.process, names=names)
    if found:
        raise Refused(found[0], "give the new QEMU the disks that the guest has now, or try again")
    encrypted = ENCRYPTED_BLOCKS if checked.has_context else frozenset()
    pairs = ram_blocks.private_pairs(checked.guest.blocks, theirs.blocks, encrypted=encrypted)
    ram = RamBlockSync(checked.source, destination.process, pairs)
    await asyncio.to_thread(ram.sync)
    return theirs, roles, ram


async def _compare_processes(
    hop: Transaction, checked: Checked, destination: Destination, launch_context: LaunchContext
) -> tuple[scheduling.Roles, scheduling.Roles]:
    """Verify that the destination is confined and scheduled as the source is."""
    confined = Confinement.of(checked.source)
    ours = await scheduling.Roles.of(checked.monitor, checked.source)
    if (cgroups := launch_context.cgroups) is not None:
        moved = tuple((controllers, cgroups.moved(controllers, path)) for controllers, path in confined.cgroups)
        confined, ours = confined._replace(cgroups=moved), ours._replace(moved=cgroups.moved)
    if (profile := launch_context.profile) is not None and confined.label == str(profile.original):
        confined = confined._replace(label=str(profile.label))
    found = confinement.differences(confined, Confinement.of(destination.process))
    theirs = await scheduling.Roles.of(destination.monitor, destination.process)
    found += scheduling.hand_over(ours, theirs)
    if confined.filters and not found:
        try:
            found = await asyncio.to_thread(confinement.filters_lost, ours.quiet, theirs.quiet)
        except seccomp_filter.UnknownFilter as err:
            hop.note(f"cannot compare the sandbox of the new QEMU: {err.message}")
    if found:
        raise Refused("; ".join(found), "start the guest in a way that sevhop can repeat, or run sevhop as root")
    return ours, theirs


async def _copy_settings(
    hop: Transaction, options: HopOptions, checked: Checked, started: Started, now: _Source
) -> None:
    """Set in the destination what was set in the source since its start; refuse the hop where that is not possible."""
    source, destination = checked.monitor, started.destination.monitor
    lost, gained = await cpu_features.compare(source, now.features, destination)
    if lost:
        raise Refused(lost, "choose another version of QEMU, or one with these features")
    theirs = await runtime_settings.read(destination, started.destination.process)
    wanted = reboot.settings_after_hop(checked.guest, now.settings)
    if checked.transit:
        wanted = wanted.without_clients()
    found = runtime_settings.differences(wanted, theirs)
    if found and not options.command:  # a whole command line may differ on purpose
        raise Refused("; ".join(found), "give the whole command line of the new QEMU after --")
    notes = await runtime_settings.carry_over(wanted, theirs, destination)
    for note in filter(None, [gained, *found, *notes]):
        hop.note(note)
