"""The first phases of a hop: check and acquire. Nothing of the guest is changed."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import NamedTuple

from sevhop_qmp import peer
from sevhop_qmp.errors import ProcessError, RamError, SevhopError
from sevhop_qmp.monitor import Monitor, SourceMonitor
from sevhop_qmp.process import QemuProcess

from ..checks import guest as guest_checks
from ..checks.result import CheckResult
from ..disks.block_graph import BlockGraph
from ..errors import Refused
from ..guest import command_line, inspection
from ..keeper.handover import SourceHandles
from ..options import HopOptions
from ..process import launch
from ..records import journal
from ..records.hop_record import HopRecord, Process
from .destination import LaunchContext
from .guest_paths import GuestPaths
from .source_watch import SourceWatch
from .stopped_guest import verify_alive
from .transaction import Transaction


class Checked(NamedTuple):
    """
    A guest that can hop. See :func:`check`.

    :ivar monitor: of the source.
    :ivar disks: as the source reports them.
    :ivar watch: the events of the source since.
    :ivar arguments: the destination's command line.
    :ivar flag: see :class:`sevhop.checks.registers.Registers`.
    :ivar transit: whether the destination is a transit: with libvirt's names of block nodes, and without displays and
        what clients are connected to.
    """

    monitor: SourceMonitor
    source: QemuProcess
    guest: inspection.Guest
    disks: BlockGraph
    watch: SourceWatch
    arguments: command_line.Derived
    working_directory: str
    flag: int = 0
    transit: bool = False

    @property
    def was_running(self) -> bool:
        """Whether the guest ran. One that was paused stays so."""
        return self.guest.state == "running"

    @property
    def has_context(self) -> bool:
        """Whether there is an SEV context to move."""
        return self.guest.context.kind != "none"

    @property
    def autostart(self) -> bool:
        """
        Whether the destination starts the guest on its own as soon as it has loaded everything. It activates the
        images first, which marks their dirty bitmaps as in use: if it was terminated then, they would be lost.
        """
        return self.was_running and not self.has_context and not self.disks.bitmaps()


class Acquired(NamedTuple):
    """
    What was taken from the source without changing it. See :func:`acquire`.

    :ivar handles: duplicates of its descriptors.
    :ivar launch_context: the environment of its process.
    :ivar guest_paths: the paths that must lead to the destination in the end.
    :ivar oom_score_adj: its own.
    """

    handles: SourceHandles
    launch_context: LaunchContext
    guest_paths: GuestPaths
    oom_score_adj: int


async def check(hop: Transaction, qmp: Path, options: HopOptions, connection: socket.socket | None = None) -> Checked:
    """
    Nothing is touched: can this guest hop, to this emulator, on this host?

    :param qmp: the source's QMP socket.
    :param connection: to it, if there is one already.
    :raises Refused: it cannot.
    """
    if connection is not None:
        hop.resources.callback(connection.close)
    try:
        # Another hop has the monitor, or an interrupted one has left the source halted, so that it would not answer.
        path = peer.absolute(qmp)
        journal.expect_none(path)
        limit = options.step_timeout
        monitor = await hop.resources.enter_async_context(
            await Monitor.connect(connection or qmp, name=str(qmp), timeout=limit, greeting_timeout=limit)
        )
        source = QemuProcess.open(monitor.peer)
        hop.resources.callback(source.close)
        hop.rollback.push(lambda: _verify_not_lost(source, qmp))
        hop.report.source_pid = source.pid
        hop.report.source_version = monitor.version
        watch = hop.resources.enter_context(SourceWatch.begin(monitor))
        working_directory = source.working_directory
        verdict = await guest_checks.standalone(monitor, source, options.emulator, options.command)
    except SevhopError as err:
        raise Refused(err.message, err.hint) from err
    checked = Checked(
        monitor, source, verdict.guest, verdict.disks, watch, verdict.arguments, working_directory, verdict.flag
    )
    hop.report.emulator = checked.arguments.emulator
    hop.report.guest = checked.guest.name
    hop.report.context = checked.guest.context.kind
    if not checked.was_running:
        hop.downtime.disown()
    verify_can_hop(verdict.tree)
    await hop.begin_record(
        HopRecord(
            kind="standalone",
            guest=checked.guest.name,
            context=checked.guest.context.kind,
            running=checked.was_running,
            source=Process.of(source),
            monitor=path,
            old=source.executable,
            new=checked.arguments.emulator,
            protected_state=checked.flag,
        )
    )
    hop.rollback.push(lambda: verify_alive(source))
    return checked


def verify_can_hop(tree: CheckResult) -> None:
    """:raises Refused: a test has failed."""
    if failures := tree.failures():
        raise Refused(f"{failures[0].name}: {failures[0].detail}", failures[0].hint)


async def _verify_not_lost(source: QemuProcess, qmp: Path) -> None:
    """
    As long as another command may replace the source, since the hop has no record yet.

    :raises GuestLost: it has exited, and no other QEMU serves its socket.
    :raises Refused: it has exited, and another one does.
    """
    if await source.lives_on():
        return
    if peer.is_served(os.fspath(qmp)):
        raise Refused("another QEMU serves that socket now", "another command has replaced it: try again")
    await verify_alive(source)


async def acquire(hop: Transaction, checked: Checked) -> Acquired:
    """
    Take the source's VM, memory and listening sockets, and the environment of its process.

    :raises Refused: the memory behind a backend cannot be identified for certain.
    """
    source = checked.source
    try:
        handles = SourceHandles.take(source, checked.guest)
    except RamError as err:
        if not source.alive:
            raise
        raise Refused(err.message, err.hint) from err
    hop.resources.callback(handles.close)
    launch_context = LaunchContext.of(source)
    hop.resources.callback(launch_context.close)
    guest_paths = GuestPaths.of(checked.working_directory, handles.listeners, checked.arguments.pidfile)
    try:
        score = launch.oom_score_adj(source.pid)
    except OSError as err:
        raise ProcessError(f"process {source.pid} has exited") from err
    hop.record(guest_paths=guest_paths.as_fields(), oom_score_adj=score)
    return Acquired(handles, launch_context, guest_paths, score)
