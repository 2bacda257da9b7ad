"""
The second hop of an upgrade: from the transit into the QEMU that libvirt has started.

The guest runs in the transit, a QEMU beside libvirt. libvirt starts the destination from a save image without a state,
and waits for the end of its incoming migration. ::

    check      the transit is inspected
    prepare    the destination is compared with it; the stream armed, its header given     undo: terminate it
    meet       the end of the migration is announced. libvirt finishes its work: hooks, its own view of the guest,
               "cont", which is remembered. With that it has accepted the destination
    stop, map, save, load                                                                   undo: as in any hop
    COMMIT     the destination's report that it runs the guest; or that it has loaded a guest that a client has paused.
               With an SEV context the move, with which it runs the guest (:mod:`sevhop.engine.transit_move`)
    finish     the destination is released, and the transit terminated

Nobody waits for libvirt: whatever it does until it has accepted the destination, the guest runs in the transit, and
after that libvirt has nothing to do any more. Every failure before the commit leads back there. The phases between are
those of a hop outside libvirt (:mod:`sevhop.engine.transfer`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path

from sevhop_qmp import adopt, device_state, ram_blocks
from sevhop_qmp.device_state import IncomingState, OutgoingState
from sevhop_qmp.errors import SevhopError, StateError
from sevhop_qmp.monitor import Commands, Monitor
from sevhop_qmp.process import QemuProcess
from sevhop_qmp.ram_block_sync import RamBlockSync
from sevhop_qmp.run_mark import RunMark, RunState

from ..disks import block_graph
from ..disks.disk_guard import DiskGuard
from ..errors import GuestState
from ..guest import command_line, cpu_features, inspection, runtime_settings
from ..guest.inspection import ENCRYPTED_BLOCKS
from ..options import HopOptions
from ..process.scheduling import Roles
from . import protected_state, transit_move
from .check import Checked
from .destination import KILL_TIMEOUT, Destination
from .prepare import Prepared
from .realtime import Watchdog
from .source_watch import SourceWatch
from .start import DestinationUndo, Started, StartNotice, explaining_exit
from .state_transfer import StateTransfer
from .stopped_guest import LOCKED_HINT, resume_guest, verify_alive
from .transaction import Transaction
from .transfer import Stopped, hand_over, map_memory, save, stop_verified

#: The longest of each wait while the guest is stopped, as a part of the step timeout: the transit can resume it.
_PART_OF_STEP = 0.3
_LOG = "see its log in /var/log/libvirt/qemu"


class RestoredDestination(Destination):
    """A destination that libvirt has started. Its directory is the keeper's, and what it prints is in libvirt's log."""

    def __init__(self, process: QemuProcess, directory: Path, monitor: Monitor) -> None:
        super().__init__(process, directory)
        self.monitor = monitor

    async def kill(self) -> None:
        """
        Kill it, and wait until it has exited.

        :raises SevhopError: it still exists. The transit must not run then.
        """
        await self.monitor.close()
        self.process.kill()
        if not await self.process.wait(KILL_TIMEOUT):
            hint = "it waits in the kernel, usually for storage: restore that, then run sevhop recover"
            raise SevhopError(f"cannot kill the new QEMU (process {self.process.pid})", hint)

    async def leave(self) -> None:
        """Disconnect, and leave it running."""
        await self.monitor.close()


@dataclass(frozen=True)
class Stream:
    """
    The pipe that adopt.so has put in the place of the save image.

    :ivar reader, writer: its ends; this hop has duplicates of them.
    :ivar given: a keeper that has exited since has given the header.
    """

    reader: int
    writer: int
    given: bool = False


@dataclass(frozen=True)
class Meeting:
    """
    The two QEMUs, connected.

    :ivar source_vm_fd: descriptor of the transit's VM, which has the SEV context; None under TCG.
    :ivar uid, gid: that QEMU runs as.
    :ivar notice: what the destination has reported about the start of the guest.
    :ivar run_mark: that the destination has.
    :ivar header_given: called when the destination has the header of the stream.
    :ivar announced: called when libvirt is about to finish its work.
    :ivar accepted: waits until libvirt has accepted the destination.
    :ivar stopping: called before the guest is stopped, with whether it runs.
    :ivar moving: called before the SEV context is moved.
    :ivar committed: called when the guest is the destination's.
    """

    monitor: Monitor
    transit: QemuProcess
    destination: RestoredDestination
    source_vm_fd: int | None
    uid: int
    gid: int
    notice: StartNotice
    run_mark: RunMark
    stream: Stream
    header_given: Callable[[], None]
    announced: Callable[[], None]
    accepted: Callable[[], Awaitable[None]]
    stopping: Callable[[bool], None]
    moving: Callable[[], None]
    committed: Callable[[], None]


class SecondHop(Transaction):
    """One attempt to hop from the transit into a destination of libvirt's."""

    def __init__(self, name: str, meeting: Meeting, options: HopOptions) -> None:
        super().__init__(name, lambda event: None)
        self._met = meeting
        self._options = options
        self._stopped_options = replace(options, step_timeout=options.step_timeout * _PART_OF_STEP)
        self._bitmaps: set[tuple[str, str]] = set()

    async def _script(self) -> None:
        destination = self._met.destination
        watchdog = Watchdog.start()
        self.resources.push_async_callback(watchdog.close)
        checked = await self.run_phase("check", self._check())
        prepared = await self.run_phase("prepare", self._prepare(checked))
        async with explaining_exit(checked, destination):
            await self.run_phase("meet", self._meet(checked, prepared))
            watchdog.watch(checked.source.pid, destination.process.pid)
            stopped = await self.run_phase("stop", self._stop(checked, prepared))
            await self.run_phase("map", map_memory(prepared))
            await self.run_phase("save", save(prepared))
            await self.run_phase("load", hand_over(self, self._stopped_options, checked, prepared, stopped))
            await self.run_phase("commit", self._commit(checked, prepared, stopped))
        await self.run_phase("finish", self._finish(checked, prepared))

    async def _check(self) -> Checked:
        met = self._met
        process = met.transit
        self.rollback.push(lambda: verify_alive(process))
        watch = self.resources.enter_context(SourceWatch.begin(met.monitor))
        guest = await inspection.inspect(met.monitor, process)
        flag = 0
        if guest.context.kind == "sev-es":
            # adopt.so has found it when this QEMU was started.
            flag = (await adopt.adopt_status(met.monitor)).protected_state_offset
        arguments = command_line.Derived(process.executable, process.command_line[1:])
        graph = await block_graph.read(met.monitor)
        checked = Checked(met.monitor, process, guest, graph, watch, arguments, "/", flag)
        if not checked.was_running:
            self.downtime.disown()
        return checked

    async def _prepare(self, checked: Checked) -> Prepared:
        """
        Compare, copy what can be copied while the guest runs, and give the destination the header of the stream.

        :raises SevhopError: the destination is not what the guest needs.
        """
        met, timeout = self._met, self._stopped_options.step_timeout
        destination, process = met.destination, met.destination.process
        incoming = self.resources.enter_context(IncomingState(destination.monitor))
        started = Started(destination, met.notice, incoming, None)
        outgoing = OutgoingState(checked.monitor, incoming)
        transfer = StateTransfer(outgoing, incoming, timeout)
        self.resources.callback(transfer.close)
        undo = DestinationUndo(self, checked, started, transfer, met.run_mark, timeout, bool(checked.disks.bitmaps()))
        self.rollback.push(undo)
        await self._leave_run_mark(checked)
        async with explaining_exit(checked, destination):
            await self._verify_adopted(checked)
            theirs = await inspection.inspect(destination.monitor, process)
            if found := inspection.differences(checked.guest, theirs):
                raise SevhopError("; ".join(found))
            words = await cpu_features.feature_words(checked.monitor)
            lost, _ = await cpu_features.compare(checked.monitor, words, destination.monitor)
            if lost:
                raise SevhopError(lost, "choose another version of QEMU, or one with these features")
            disks = await DiskGuard.open(checked.monitor, checked.source)
            self.resources.callback(disks.close)
            if found := await disks.differences(destination.monitor, process, names=False):
                raise SevhopError(found[0])
            self._bitmaps = await _bitmaps(destination.monitor)
            encrypted = ENCRYPTED_BLOCKS if checked.has_context else frozenset()
            pairs = ram_blocks.private_pairs(checked.guest.blocks, theirs.blocks, encrypted=encrypted)
            ram = RamBlockSync(checked.source, process, pairs)
            await asyncio.to_thread(ram.sync)
            settings = await runtime_settings.read(checked.monitor, checked.source)
            roles = await Roles.of(checked.monitor, checked.source), await Roles.of(destination.monitor, process)
            await self.resources.enter_async_context(outgoing)
            await outgoing.arm(met.uid, met.gid)
            await self._arm(incoming, device_state.header(checked.guest.machine_type))
            await protected_state.forbid_resets(self, checked.monitor, checked.source, checked.flag)
            flag = protected_state.open_flag(self, checked.source, checked.flag)
        arguments = checked.arguments
        return Prepared(started, arguments, met.run_mark, theirs, disks, ram, settings, roles, transfer, undo, flag)

    async def _leave_run_mark(self, checked: Checked) -> None:
        """With the transit: if all keepers die, it says whether what is in there is outdated."""
        fdset, _ = await checked.monitor.add_fd(self._met.run_mark.fileno())

        async def remove() -> None:
            with contextlib.suppress(SevhopError):
                await checked.monitor.execute("remove-fd", {"fdset-id": fdset})

        self.rollback.push(remove)

    async def _arm(self, incoming: IncomingState, header: bytes) -> None:
        stream = self._met.stream
        await incoming.arm_restored(stream.reader, FileIO(stream.writer, "wb"), header, given=stream.given)
        self._met.header_given()

    async def _verify_adopted(self, checked: Checked) -> None:
        """:raises SevhopError: the destination has not adopted the memory of a guest that runs elsewhere."""
        status = await adopt.adopt_status(self._met.destination.monitor)
        if status.source != "running" or status.ram == "none" or status.ran:
            raise SevhopError(
                f"the new QEMU has not adopted the guest's memory (it is {status.ram}, source {status.source})",
                "run: sevhop install --verify, then restore the domain again",
            )
        if checked.has_context and self._met.source_vm_fd is None:
            raise SevhopError("cannot move the SEV context: the transit has no KVM VM")

    async def _meet(self, checked: Checked, prepared: Prepared) -> None:
        """
        Announce the guest, and wait until libvirt has accepted the destination.

        :raises SevhopError: it cannot be announced, or libvirt does not accept it.
        """
        result = await prepared.started.incoming.announce(timeout=self._options.step_timeout)
        if not result.announced:
            raise SevhopError(f"the new QEMU cannot announce the guest: it lacks {result.missing}")
        self._met.announced()
        await self._met.accepted()
        if not checked.was_running:
            # The image asks for a running guest, since only then libvirt reports that it has finished.
            await prepared.started.destination.monitor.execute("stop")

    async def _stop(self, checked: Checked, prepared: Prepared) -> Stopped:
        """:raises SevhopError: the guest is not what it was when it was inspected."""
        await inspection.verify_unchanged(checked.monitor, checked.guest)
        await prepared.disks.verify_unchanged(checked.monitor)
        await checked.watch.verify_undisturbed()
        await self._remove_new_bitmaps(prepared.started.destination.monitor)
        self._met.stopping(checked.was_running)
        return await stop_verified(self, checked, prepared)

    async def _remove_new_bitmaps(self, monitor: Commands) -> None:
        """
        libvirt reports a running domain already. A bitmap that a client has added to the destination since does not
        record what the guest writes in the transit, so a backup that relies on it would be wrong.

        :raises SevhopError: it cannot be removed.
        """
        for node, name in await _bitmaps(monitor) - self._bitmaps:
            await monitor.execute("block-dirty-bitmap-remove", {"node": node, "name": name})
            self.note(f"dirty bitmap {name} was added before the guest was there, and removed: make a full backup")

    async def _commit(self, checked: Checked, prepared: Prepared, stopped: Stopped) -> None:
        """
        The destination has loaded everything. It runs the guest, unless a client has stopped it meanwhile.

        :raises StateError: it should run it, and does not.
        :raises MoveError: the SEV context was not moved.
        :raises RecoveryRequired: see :func:`.transit_move.move_out`.
        """
        if checked.has_context:
            runs = await self._move(prepared, stopped)
            self.committed_state = GuestState.RUNNING_IN_NEW if runs else GuestState.PAUSED_IN_NEW
        else:
            runs = await self._started(prepared)
            self.commit(GuestState.RUNNING_IN_NEW if runs else GuestState.PAUSED_IN_NEW)
            self._met.committed()
        stopped.boost.reset()
        self.downtime_ends()
        self.record(loaded=True)

    async def _started(self, prepared: Prepared) -> bool:
        """:return: whether the destination has started the guest, which has no SEV context, on its own."""
        notice, monitor = prepared.started.keeper, prepared.started.destination.monitor
        if not notice.runs.is_set():
            # Whatever clients ask for from here on, QEMU does itself.
            status = await adopt.adopt_status(monitor)
            runs = status.announced == "running" or (status.announced == "none" and self.downtime.began)
            if runs and not status.ran and not notice.revoke_start():
                raise StateError("the new QEMU cannot start the guest", f"{LOCKED_HINT}; {_LOG}")
        return notice.runs.is_set()

    async def _move(self, prepared: Prepared, stopped: Stopped) -> bool:
        """:return: whether the guest runs in the destination, now that the context is there."""
        met, monitor = self._met, prepared.started.destination.monitor
        assert met.source_vm_fd is not None
        met.moving()
        options = self._stopped_options
        await transit_move.move_out(self, options, prepared, stopped, met.source_vm_fd, met.committed)
        if met.run_mark.read() is not RunState.RAN and (await adopt.adopt_status(monitor)).announced == "running":
            await resume_guest(monitor)
        return met.run_mark.read() is RunState.RAN

    async def _finish(self, checked: Checked, prepared: Prepared) -> None:
        destination = prepared.started.destination
        await prepared.transfer.until_reported()
        if self.committed_state is GuestState.PAUSED_IN_NEW:
            try:
                await block_graph.activate(destination.monitor)
            except SevhopError as err:
                self.note(f"the disks of the paused guest are activated when it is resumed: {err.message}")
        await adopt.finish(destination.monitor)
        checked.source.kill()
        if not await checked.source.wait(self._options.step_timeout):
            self.note(f"the transit (process {checked.source.pid}) was killed and has not exited: restore its storage")


async def _bitmaps(monitor: Commands) -> set[tuple[str, str]]:
    """The dirty bitmaps of a QEMU: node and name."""
    graph = await block_graph.read(monitor)
    return {(node.name, bitmap.name) for node in graph.nodes.values() for bitmap in node.bitmaps if bitmap.name}
