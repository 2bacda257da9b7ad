"""
The phase of a hop after the commit: finish. Nothing here can hurt the guest, and all of it may be repeated, as ``sevhop
recover`` does.
"""

from __future__ import annotations

from collections.abc import Callable

import tenacity
from sevhop_qmp import adopt
from sevhop_qmp.errors import CommandError, SevhopError
from sevhop_qmp.monitor import Monitor
from sevhop_qmp.process import QemuProcess

from ..disks import block_graph
from .destination import Destination
from .guest_paths import GuestPaths

#: Seconds for which ``cont`` is retried, while something else has locked the guest's disk images.
CONT_DEADLINE = 10.0


async def finish(
    source: QemuProcess | None,
    destination: Destination,
    guest_paths: GuestPaths,
    *,
    context: str,
    timeout: float,
    note: Callable[[str], None],
) -> bool:
    """
    The guest runs in the destination: kill the source, if it is still there, and let its guest paths lead to the
    destination. May be repeated.

    The source is not asked to quit: nothing of the guest is left for it to do, and it would tell its clients of a
    shutdown that is none, and remove the paths of sockets that are the destination's.

    :param context: of the guest.
    :param timeout: seconds in which the source must have exited.
    :param note: called with what went wrong; none of it matters to the guest.
    :return: whether the destination was released. Otherwise its sockets do not answer yet, and this should be
        repeated; or it has exited, and the source was left as it is.
    """
    if not destination.process.alive:
        note("the new QEMU has exited")
        await destination.monitor.close()
        return False
    if source is not None:
        guest_paths.link()
        source.kill()
        if not await source.wait(timeout):
            note("the source was killed and has not exited yet")
    for text in guest_paths.publish():
        note(text)
    if context != "none":
        # The firmware of an SEV guest was encrypted in place at launch, in pages of the source. A reset would execute
        # what is no code here, so a guest that reboots is shut down; it can be started from a cold start.
        try:
            await destination.monitor.execute("set-action", {"reboot": "shutdown"})
        except SevhopError as err:
            note(f"a reboot of the guest will fail: {err.message}")
    try:
        await adopt.finish(destination.monitor)
    except SevhopError as err:
        note(f"the destination's sockets do not answer until sevhop recover has run: {err.message}")
        await destination.leave()
        return False
    await destination.release()
    return True


#: Run states in which a ``stop`` leaves a guest. In any other it is not ours to resume.
STOPPED = frozenset({"paused", "postmigrate", "finish-migrate"})


async def resume_source(monitor: Monitor, *, running: bool) -> str:
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


async def resume_guest(monitor: Monitor) -> None:
    """
    Let a guest run. Something else may have locked its disk images for a moment, so a refusal is retried for
    :data:`CONT_DEADLINE` seconds.

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
