"""Starts a destination, and terminates it again if the hop is rolled back."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from sevhop_qmp import device_state
from sevhop_qmp.device_state import IncomingState
from sevhop_qmp.errors import (
    CommandError,
    MonitorClosed,
    MonitorError,
    ProcessError,
    RamError,
    SevhopError,
    StateError,
)
from sevhop_qmp.process import QemuProcess
from sevhop_qmp.run_mark import RunMark, RunState

from ..cancellation import shielded
from ..errors import GuestState, RecoveryRequired
from ..guest import command_line, reboot
from ..keeper.local import LocalKeeper
from ..options import HopOptions
from ..records.hop_record import Process
from .check import Acquired, Checked
from .destination import Destination
from .state_transfer import StateTransfer
from .transaction import CommitState, Transaction

#: Seconds for each step, at least, where there is no rollback: late is better than lost.
PATIENCE = 60.0
#: How QEMU begins a message if it cannot load a state (``process_incoming_migration_co``, migration/migration.c).
_NOT_LOADED = "load of migration failed"


class StartNotice(Protocol):
    """
    What a keeper knows of the start of the guest in a destination.

    :ivar runs: set when the destination, which has received all of the guest, lets it run.
    """

    runs: asyncio.Event

    def revoke_start(self) -> bool:
        """See :meth:`sevhop.keeper.local.LocalKeeper.revoke_start`."""


class Started(NamedTuple):
    """
    A destination that waits for the device state. See :func:`start_destination`.

    :ivar keeper: serves its requests.
    :ivar vm: duplicate of its KVM VM, in which an SEV context is safe if it exits; None under TCG.
    """

    destination: Destination
    keeper: StartNotice
    incoming: IncomingState
    vm: int | None


async def start_destination(
    hop: Transaction,
    options: HopOptions,
    checked: Checked,
    acquired: Acquired,
    arguments: command_line.Derived,
    run_mark: RunMark,
) -> Started:
    """
    Start a destination, and have it wait for the device state.

    :raises SevhopError: it did not start; no process is left then.
    """
    guest, stops = checked.guest, reboot.stops(checked.guest)
    keeper = hop.resources.enter_context(
        LocalKeeper(acquired.handles, guest.context, run_mark, checked.source, stops_at_reboot=stops)
    )

    cgroups = acquired.launch_context.cgroups

    async def record_destination(process: QemuProcess, directory: Path) -> None:
        hop.record(destination=Process.of(process), directory=str(directory))
        if cgroups is not None:
            # In a thread: it waits for systemd, and the guest of another hop may be stopped meanwhile.
            for text in await shielded(asyncio.to_thread(cgroups.enter, process.pid)):
                hop.note(text)

    destination = await Destination.start(
        arguments.emulator,
        arguments.arguments,
        acquired.launch_context,
        keeper,
        timeout=options.start_timeout,
        command_timeout=options.step_timeout,
        started=record_destination,
        paused=not checked.autostart,
    )
    try:
        hop.report.destination_pid = destination.process.pid
        hop.report.destination_version = destination.monitor.version
        incoming = hop.resources.enter_context(IncomingState(destination.monitor))
        async with explaining_exit(checked, destination):
            await incoming.arm(device_state.header(checked.guest.machine_type))
        # A descriptor of a VM keeps its context alive. If the destination exits after the move, it is in this one.
        number = destination.process.vm_descriptor()
        vm = None if number is None else destination.process.duplicate(number)
        if vm is not None:
            hop.resources.callback(os.close, vm)
    except BaseException:
        try:
            await shielded(destination.kill())
        except SevhopError as err:
            state = GuestState.RUNNING_IN_OLD if checked.was_running else GuestState.PAUSED_IN_OLD
            if hop.state is CommitState.COMMITTED:
                state = hop.committed_state
            raise RecoveryRequired(err.message, err.hint, state) from err
        raise
    return Started(destination, keeper, incoming, vm)


@dataclass
class DestinationUndo:
    """
    Terminates the destination, so that the source may run the guest; done once, however often it is called.

    :ivar timeout: seconds for each step.
    :ivar has_bitmaps: whether there are dirty bitmaps in the guest's images.

    :raises RecoveryRequired: the destination has the guest, and was left as it is.
    :raises SevhopError: it cannot be terminated.
    """

    hop: Transaction
    checked: Checked
    started: Started
    transfer: StateTransfer
    run_mark: RunMark
    timeout: float
    has_bitmaps: bool
    done: bool = False

    async def __call__(self) -> None:
        if self.done:
            return
        destination, transfer = self.started.destination, self.transfer
        process = destination.process
        source_ended = transfer.forwarded and not self.checked.source.alive
        if source_ended:
            await transfer.arrival(PATIENCE)
        if self.started.keeper.revoke_start():
            self.hop.commit(GuestState.RUNNING_IN_NEW)
            await destination.leave()
            raise RecoveryRequired(
                f"the guest runs in the new QEMU (process {process.pid}) already", guest_state=GuestState.RUNNING_IN_NEW
            )
        if transfer.forwarded and not self.checked.source.alive and process.alive:
            # Only the destination has the guest. Leave it there, paused.
            await destination.leave()
            raise RecoveryRequired(
                f"the old QEMU has exited, and the guest is in the new one (process {process.pid})",
                guest_state=GuestState.PAUSED_IN_NEW,
            )
        if self.run_mark.read() is not RunState.NOT:
            # The keeper has refused the start, and it is about to exit; or another client has resumed the guest there.
            await process.wait(self.timeout)
            if self.run_mark.read() is not RunState.NOT:
                raise RecoveryRequired(f"the guest has run in the new QEMU (process {process.pid})")
        if transfer.loaded and self.has_bitmaps:
            # It may have activated the images: on a regular exit it stores the bitmaps as they were.
            with contextlib.suppress(MonitorError, CommandError):
                await destination.monitor.execute("quit")
                await process.wait(self.timeout)
        await destination.kill()
        self.done = True


@contextlib.asynccontextmanager
async def explaining_exit(checked: Checked, destination: Destination) -> AsyncIterator[None]:
    """Translate an error caused by the exit of the destination: what QEMU has printed before is more specific."""
    try:
        yield
    except (MonitorError, ProcessError, RamError, StateError) as err:
        if isinstance(err, (MonitorClosed, StateError)) and not checked.monitor.closed:
            await destination.process.wait(1.0)  # it is about to exit, and then it has printed why
        if destination.process.alive:
            raise
        printed = destination.last_error()
        hint = err.hint or (_hint(printed) if printed else "see dmesg for why, then try again")
        raise StateError("the new QEMU exited" + (f": {printed}" if printed else ""), hint) from err


def _hint(printed: str) -> str:
    # It says so, too, if the state ends early, since something else has failed.
    return "if it does so again, choose another version of QEMU" if _NOT_LOADED in printed else ""
