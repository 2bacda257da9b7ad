"""
The phase of a hop after the commit: finish. Nothing here can hurt the guest, and all of it may be repeated, as ``sevhop
recover`` does.
"""

from __future__ import annotations

from collections.abc import Callable

from sevhop_qmp import adopt
from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import QemuProcess

from ..errors import RecoveryRequired
from ..options import HopOptions
from .check import Acquired, Checked
from .commit import activate
from .destination import Destination
from .guest_paths import GuestPaths
from .prepare import Prepared
from .start import Started
from .transaction import Transaction


async def finish(
    hop: Transaction, options: HopOptions, checked: Checked, acquired: Acquired, prepared: Prepared, started: Started
) -> None:
    """
    The guest runs in the destination: give it what it has not yet, and kill the source.

    :raises RecoveryRequired: the destination has exited; ``sevhop recover`` decides about the source.
    """
    await activate_disks(hop, prepared, started)
    completed = await complete(
        checked.source,
        started.destination,
        acquired.guest_paths,
        oom_score_adj=acquired.oom_score_adj,
        timeout=options.step_timeout,
        note=hop.note,
    )
    hop.unfinished = not completed


async def activate_disks(hop: Transaction, prepared: Prepared, started: Started) -> None:
    """Give the destination those disks that no device has, and report dirty bitmaps that are missing there."""
    if prepared.disks.graph.spare():
        await activate(hop, started, "block nodes that no device has are not in use")
    for text in await prepared.disks.lost_bitmaps(started.destination.monitor):
        hop.note(text)


async def complete(
    source: QemuProcess | None,
    destination: Destination,
    guest_paths: GuestPaths,
    *,
    oom_score_adj: int,
    timeout: float,
    note: Callable[[str], None],
) -> bool:
    """
    The guest runs in the destination: kill the source, if it is still there, and let its guest paths lead to the
    destination. May be repeated.

    The source is not asked to quit: nothing of the guest is left for it to do, and it would notify its clients of a
    shutdown that is none, and remove the paths of sockets that are the destination's.

    :param oom_score_adj: that the source had.
    :param timeout: seconds in which the source must have exited.
    :param note: called with what went wrong; none of it matters to the guest.
    :return: whether the destination was released. Otherwise its sockets do not answer yet, and this should be repeated.
    :raises RecoveryRequired: the destination has exited; the source was left as it is.
    """
    if not destination.process.alive:
        await destination.monitor.close()
        raise RecoveryRequired(
            "the new QEMU exited after the commit", "sevhop recover finds out whether the guest has run there"
        )
    destination.protect(oom_score_adj, note)
    if source is not None:
        guest_paths.link()
        source.kill()
        if not await source.wait(timeout):
            note(f"the old QEMU (process {source.pid}) was killed and has not exited: restore its storage")
    for text in guest_paths.publish():
        note(text)
    try:
        await adopt.finish(destination.monitor)
    except SevhopError as err:
        note(f"the new QEMU's sockets do not answer until sevhop recover has run: {err.message}")
        await destination.leave()
        return False
    await destination.release()
    return True
