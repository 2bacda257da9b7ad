"""
The destination as the keeper sees it: queried while libvirt sets it up, verified at the commit, watched until it runs.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

from sevhop_qmp import adopt, ram_blocks
from sevhop_qmp.errors import MonitorError, MonitorTimeout
from sevhop_qmp.monitor import Monitor
from sevhop_qmp.process import QemuProcess
from sevhop_qmp.ram_blocks import RamBlock
from sevhop_qmp.run_mark import RunMark, RunState

from ..disks import block_graph, comparison
from ..disks.block_graph import BlockGraph
from ..disks.images import Images
from ..guest import saved_settings
from .config import KeeperConfig, KeeperError
from .paths import KeeperPaths

#: Seconds within which a destination's machine is complete, counted from when its monitor exists.
_MACHINE_TIMEOUT = 60.0
#: Seconds between two attempts to connect to that monitor.
_MONITOR_POLL = 0.005
#: Seconds between two reads of the run mark of one that sends no event.
_MARK_POLL = 1.0


@dataclass(frozen=True)
class ProbedDestination:
    """
    A destination whose machine is complete.

    :ivar lost: CPU features that the source has and it does not have.
    """

    monitor: Monitor
    process: QemuProcess
    blocks: dict[str, RamBlock]
    disks: BlockGraph
    lost: str


async def probe(config: KeeperConfig, paths: KeeperPaths) -> ProbedDestination:
    """
    Wait for the destination's monitor, and query it while libvirt still sets it up, not after: that takes time, too.

    :raises KeeperError: another user serves that monitor.
    :raises SevhopError: the destination does not answer, has exited, or its answers make no sense.
    """
    while True:
        try:
            # It answers when its machine is complete.
            monitor = await Monitor.connect(
                paths.monitor, timeout=config.step_timeout, greeting_timeout=_MACHINE_TIMEOUT
            )
            break
        except MonitorError as err:
            # bind() precedes listen(): retry ENOENT and ECONNREFUSED.
            if not isinstance(err.__cause__, (FileNotFoundError, ConnectionRefusedError)):
                raise
        await asyncio.sleep(_MONITOR_POLL)
    process = QemuProcess.open(monitor.peer)
    # QEMU's user may create anything in place of that socket, but not a process of another user.
    if (uid := process.credentials.uid) not in (0, config.uid):
        await monitor.close()
        raise KeeperError(
            f"cannot trust the new QEMU: its monitor is served by process {monitor.peer} of another user ({uid})",
            "find out who runs that process: it can write to the directory of QEMU's monitor",
        )
    try:
        lost = await saved_settings.set_before_it_runs(paths.directory, monitor)
        blocks = await ram_blocks.read(monitor, process)
        return ProbedDestination(monitor, process, blocks, await block_graph.read(monitor), lost)
    except BaseException:
        await monitor.close()
        raise


async def verify(probed: ProbedDestination, config: KeeperConfig, images: Images | None, peer: int | None) -> None:
    """
    Verify, right before the commit, that this is the destination of this guest and has not run it.

    :param images: the source's; None where disks are not compared.
    :param peer: pid of the process that has asked for the guest's memory.
    :raises KeeperError: it is not.
    :raises SevhopError: it does not answer, or has exited.
    """
    monitor, process = probed.monitor, probed.process
    status = await adopt.adopt_status(monitor)
    if status.source != "ended" or status.ram != "shared":
        raise KeeperError(
            f"cannot start the guest: the new QEMU has not adopted the guest's memory (it is {status.ram})",
            "run: sevhop install --verify, then restore the domain again",
        )
    if process.pid != peer:
        raise KeeperError(
            f"cannot start the guest: process {peer} was given its memory, but process {process.pid} is the new QEMU",
            "find out what the first one is, and restore the domain again when it has exited",
        )
    if (await monitor.execute("query-status"))["running"]:
        raise KeeperError("cannot start the guest: the new QEMU runs already", "restore the domain again")
    if probed.lost:
        raise KeeperError(probed.lost, "choose another version of QEMU, or one with these features")
    if config.disks is not None and images is not None:
        found = comparison.differences(config.disks, probed.disks, names=False)
        if found := found or images.others_of(probed.disks, process):
            raise KeeperError(found[0])


async def reach(process: QemuProcess, config: KeeperConfig, paths: KeeperPaths) -> Monitor:
    """
    Connect to the monitor of a known destination.

    :raises SevhopError: it does not answer, or another process does.
    """
    monitor = await Monitor.connect(paths.monitor, timeout=config.step_timeout)
    if monitor.peer != process.pid:
        await monitor.close()
        raise KeeperError(f"process {monitor.peer} has the monitor of the new QEMU, process {process.pid}")
    return monitor


async def wait_running(monitor: Monitor, run_mark: RunMark) -> None:
    """
    Wait until the guest runs there, or has: the run mark records that, if it was stopped again or QEMU sends no event.

    :raises MonitorError: QEMU has exited, or does not answer.
    """
    async with monitor:
        with monitor.events("RESUME") as events:
            while run_mark.read() is RunState.NOT and not (await monitor.execute("query-status"))["running"]:
                with contextlib.suppress(MonitorTimeout):
                    await monitor.next_event(events, timeout=_MARK_POLL)
