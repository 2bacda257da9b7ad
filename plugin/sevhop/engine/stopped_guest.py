"""
A guest that a hop has stopped: verified to be, and resumed.

Shared by hop and upgrade, and by recovery, which does what their rollbacks do.
"""

from __future__ import annotations

import contextlib

import tenacity
from sevhop_qmp.errors import CommandError, SevhopError
from sevhop_qmp.monitor import Commands, SourceMonitor
from sevhop_qmp.process import QemuProcess
from sevhop_qmp.thread_states import ThreadStates

from ..disks import block_graph
from ..errors import LOST_HINT, GuestLost
from ..process import launch

#: Seconds for which ``cont`` is retried, while something else has locked the guest's disk images.
CONT_DEADLINE = 10.0
#: Seconds in which a QEMU that has closed its monitor must have exited.
EXIT_PATIENCE = 5.0
#: What to do if a QEMU does not start the guest.
LOCKED_HINT = "usually another process has locked a disk image: find that process, then try again"
#: Run states in which a ``stop`` leaves a guest. In any other it is not ours to resume.
STOPPED = frozenset({"paused", "postmigrate", "finish-migrate"})


async def verify_alive(source: QemuProcess) -> None:
    """:raises GuestLost: the rollback has nobody to resume."""
    if not await source.lives_on():
        raise GuestLost("the old QEMU exited unexpectedly, and the guest with it", LOST_HINT)


def resumed_by_another() -> SevhopError:
    """The error for a guest that runs although the hop has stopped it: the state that was saved is out of date."""
    return SevhopError("another client has resumed the guest", "stop that client, then try again")


async def verify_stopped(monitor: Commands, state: str | None = None) -> str:
    """
    Query whether the guest is stopped.

    :param state: the run state that it must still be in.
    :return: its run state.
    :raises SevhopError: another client has resumed it, or reset it.
    """
    status = await monitor.execute("query-status")
    if status["running"]:
        raise resumed_by_another()
    if state not in (None, status["status"]):
        # It was resumed and stopped again, or reset: both leave another run state, and QEMU does not tell which it was.
        raise SevhopError("another client has resumed or reset the guest", "stop that client, then try again")
    return str(status["status"])


async def halt(source: QemuProcess, timeout: float, states: ThreadStates | None = None) -> None:
    """
    From now on the source executes nothing, whatever command it gets on any monitor: nobody can resume the guest there.

    :param timeout: seconds.
    :param states: see :meth:`sevhop_qmp.process.QemuProcess.freeze`.
    :raises SevhopError: it cannot be halted.
    """
    if not await source.freeze(timeout, states) and source.alive:
        hint = "it waits in the kernel, usually for storage: restore that, then try again"
        raise SevhopError(f"cannot halt the old QEMU (process {source.pid})", hint)


async def resume_source(monitor: SourceMonitor, *, running: bool) -> str:
    """
    Resume a source that a hop may have stopped, and activate its disk images.

    :param running: whether a hop has stopped it. One that has shut down since, or had an I/O error, stays as it is.
    :return: its run state then.
    :raises SevhopError: it cannot be resumed.
    """
    status = await monitor.execute("query-status")
    state = str(status["status"])
    if running and state in STOPPED:
        await resume_guest(monitor)
        state = "running"
    elif not status["running"]:
        await block_graph.activate(monitor)
    await block_graph.activate_spares(monitor)
    return state


async def resume_guest(monitor: SourceMonitor) -> None:
    """
    Let a guest run, in either QEMU. Something else may have locked its disk images for a moment, so a refusal is
    retried for :data:`CONT_DEADLINE` seconds.

    :raises CommandError: QEMU's last refusal.
    """
    async for attempt in tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type(CommandError),
        stop=tenacity.stop_after_delay(CONT_DEADLINE),
        wait=tenacity.wait_exponential(multiplier=0.01, max=0.5),
        reraise=True,
    ):
        with attempt:
            await monitor.execute("cont", timeout=max(CONT_DEADLINE, monitor.timeout))
            # A QEMU that could not activate its disk images after loading returns success, and stays paused.
            status = await monitor.execute("query-status")
            if not status["running"]:
                raise CommandError("cont", f"the guest is still {status['status']}")


def restore_oom_score_adj(source: QemuProcess, score: int) -> None:
    """The source has the guest again: the OOM killer treats it as before the hop."""
    with contextlib.suppress(OSError):  # it has exited
        launch.set_oom_score_adj(source.pid, score)
