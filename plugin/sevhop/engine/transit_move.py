"""
The move of an SEV context out of a transit: the commit of the second hop of an upgrade.

One command in the destination activates the disk images, which may fail; has the kernel move the context, after which
there is no way back; and lets the guest run, if clients of the destination want it to. Nobody comes between these
(``qmp_ext/adopt/announce.c``). So whoever dies around the move, the guest is in one of two QEMUs, and the transit
reports in which: the kernel does not serve its VM any more when the context has left.
"""

from __future__ import annotations

from collections.abc import Callable

from sevhop_qmp import adopt, move
from sevhop_qmp.errors import MoveUncertain, SevhopError
from sevhop_qmp.monitor import Commands, Monitor
from sevhop_qmp.process import QemuProcess

from ..errors import LOST_HINT, GuestState, RecoveryRequired
from ..options import HopOptions
from .prepare import Prepared
from .stopped_guest import resume_guest
from .transaction import Transaction
from .transfer import Stopped

_CANNOT_RUN = "the guest cannot run any more: shut it down, start it again, and report this"


class ContextLost(SevhopError):
    """The transit has exited with the SEV context, and no other QEMU can run the guest."""


async def move_out(
    hop: Transaction,
    options: HopOptions,
    prepared: Prepared,
    stopped: Stopped,
    source_vm_fd: int,
    moved: Callable[[], None],
) -> None:
    """
    Move the context into the destination, which has loaded all the rest.

    :param source_vm_fd: descriptor of the transit's VM.
    :param moved: called when that is done.
    :raises MoveError, CommandError: the context was not moved; the transit has it.
    :raises RecoveryRequired: it is unknown whether it was, and neither QEMU may run the guest until that is found out;
        or it was, and the guest cannot run.
    """
    destination = prepared.started.destination
    with hop.committing():
        try:
            report = await move.move(
                destination.monitor, destination.process.pid, source_vm_fd, deadline=options.move_deadline
            )
        except MoveUncertain as err:
            hop.commit(GuestState.UNKNOWN)
            stopped.boost.reset_all()
            raise RecoveryRequired(f"the SEV context may have been moved: {err.message}") from err
        hop.report.move = report
        hop.commit(GuestState.PAUSED_IN_NEW)
    moved()
    _verify_registers(report)


async def has_left(transit: Commands) -> bool:
    """
    Whether the context was moved out of a transit, so that the guest cannot run there any more.

    :param transit: its monitor. Nobody moves the context now.
    :raises SevhopError: it does not answer.
    """
    return (await adopt.adopt_status(transit)).vm_dead


async def complete(monitor: Monitor, process: QemuProcess, source_vm_fd: int | None, deadline: float) -> None:
    """
    The guest is in a destination which has loaded everything: finish what was interrupted. May be repeated.

    :param source_vm_fd: descriptor of the transit's VM, which has the context if the destination does not; or None.
    :param deadline: seconds for which a busy move is retried.
    :raises ContextLost: it cannot run there.
    :raises SevhopError: it does not run there.
    """
    status = await adopt.adopt_status(monitor)
    if status.context != "none" and not status.moved:
        if source_vm_fd is None:
            raise ContextLost("the SEV context was lost with the transit", LOST_HINT)
        _verify_registers(await move.move(monitor, process.pid, source_vm_fd, deadline=deadline))
        status = await adopt.adopt_status(monitor)
    if status.context != "none" and status.announced == "running" and not (status.ran or status.finished):
        await resume_guest(monitor)


def _verify_registers(report: move.MoveReport) -> None:
    """:raises RecoveryRequired: some could not be set, and the guest was not started."""
    if report.restore_errno:
        raise RecoveryRequired(
            f"the context was moved, but vCPU registers could not be set: {move.explain(report.restore_errno).meaning}",
            _CANNOT_RUN,
            GuestState.PAUSED_IN_NEW,
        )
