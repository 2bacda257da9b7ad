"""
The phase of a hop after the commit: finish. Nothing here can hurt the guest, and all of it may be repeated, as ``sevhop
recover`` does.
"""

from __future__ import annotations

from collections.abc import Callable

from sevhop_qmp import adopt
from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import QemuProcess

from .destination import Destination
from .guest_paths import GuestPaths


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
