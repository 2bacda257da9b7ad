"""
The hop: a running guest changes its QEMU.

::

    check      nothing is touched: can this guest hop, to this emulator, on this host?
    hold       the keeper takes the source's VM, memory and listening sockets        undo: let go
    prepare    destination started, incoming; stream armed, its head given           undo: kill it
    freeze     source stopped; it begins to save its state                           undo: cont
    share      the destination maps the guest's RAM; blocks that are private go over undo: kill it, cont
    save       device state goes over                                                undo: kill it, cont
    load       source halted (SIGSTOP); destination has loaded it all                undo: kill it, SIGCONT, cont
    COMMIT     one ioctl in the destination moves the SEV context                    no undo: forward only
    resume     destination runs
    retire     source killed, its paths and sockets are the destination's

Each phase is one method of :class:`Hop`, its undo is pushed where it becomes due, and undoing means to unwind that
stack. Before COMMIT every failure, also SIGINT and SIGTERM, ends with the guest running in the source. For a guest
without SEV context there is nothing to move: its destination lets it run when all is loaded, and what commits is that
it says so, right before, to the keeper, who can make that impossible. Whatever ends then, whether the guest has run
there can be told by its run mark (:mod:`sevhop_qmp.run_mark`).

At no moment can two QEMUs run the guest: the source is continued only after the destination is known to have ended, and
the destination is continued only when the source has stopped (and, with SEV, the kernel has made it unable to run).
When its state has been saved the source is halted and executes nothing, so nobody else can continue it either.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tenacity
from sevhop_qmp import adopt, device_state, move, ram_blocks
from sevhop_qmp.device_state import IncomingState, OutgoingState
from sevhop_qmp.errors import (
    CommandError,
    MonitorClosed,
    MonitorError,
    MoveError,
    MoveUncertain,
    ProcessError,
    RamError,
    SevhopError,
    StateError,
)
from sevhop_qmp.monitor import COMMAND_TIMEOUT, Monitor
from sevhop_qmp.process import QemuProcess
from sevhop_qmp.run_mark import RunMark, RunState
from sevhop_qmp.thread_states import ThreadStates

from ..checks import guest as guest_checks
from ..disks import block_graph
from ..disks.disk_guard import DiskGuard
from ..errors import Interrupted, Lost, NeedsRecover, Refused, Undone
from ..events import Listener, MoveTried, ignore
from ..guest import command_line, cpu_features, inspection, runtime_settings
from ..guest.inspection import ENCRYPTED_BLOCKS
from ..keeper.handover import Held, Keeper
from ..process import confinement, launch, scheduling, seccomp_filter
from ..process.confinement import Confinement
from ..records import journal
from ..records.journal import Entry, Process
from .destination import START_TIMEOUT, Destination, Surroundings
from .guest_paths import NamePlates
from .realtime import Watch, keeping_timer_slack, urgent
from .source_watch import SourceWatch
from .transaction import Procedure, expected

#: Seconds for which a source that is to be continued is asked again, while something holds its disk images.
CONT_DEADLINE = 10.0
#: Seconds for each step, at least, where there is no way back: late is better than lost.
_PATIENCE = 60.0


@dataclass(frozen=True)
class Options:
    """
    What to hop, and how patiently.

    :ivar source: path of the source's QMP socket.
    :ivar emulator: the QEMU to hop to; by default the file from which the source was started, as it is now.
    :ivar command: the destination's whole command line; by default the source's own.
    :ivar step_timeout: seconds that each step in the blackout may take.
    :ivar start_timeout: seconds in which the destination must come up.
    :ivar move_deadline: seconds for which a busy migration is tried again.
    """

    source: Path
    emulator: str | None = None
    command: Sequence[str] | None = None
    step_timeout: float = COMMAND_TIMEOUT
    start_timeout: float = START_TIMEOUT
    move_deadline: float = 2.0


class Hop(Procedure):
    """A hop of a guest that runs outside libvirt."""

    def __init__(self, options: Options, listener: Listener = ignore) -> None:
        super().__init__(str(options.source), listener)
        self._options = options
        self._undo = contextlib.AsyncExitStack()
        self._slack = self._resources.enter_context(contextlib.ExitStack())
        self._hurry = self._resources.enter_context(contextlib.ExitStack())
        self._own_hurry = self._resources.enter_context(contextlib.ExitStack())
        self._by_itself = False
        self._saved = False
        self._stream_ended = False
        self._loaded = False
        self._moving = False
        self._committed = False

        # Set by the phase that is named.
        self._source: QemuProcess  # check
        self._source_monitor: Monitor  # check
        self._guest: inspection.Guest  # check
        self._checked_disks: block_graph.BlockGraph  # check
        self._watch: SourceWatch  # check
        self._working_directory: str  # check
        self._arguments: command_line.Derived  # check
        self._held: Held  # hold
        self._surroundings: Surroundings  # hold
        self._plates: NamePlates  # hold
        self._run_mark: RunMark  # prepare
        self._keeper: Keeper  # prepare
        self._destination: Destination  # prepare
        self._theirs: inspection.Guest  # prepare; the same in the destination
        self._roles: tuple[scheduling.Roles, scheduling.Roles]  # prepare; of the source and the destination
        self._settings: runtime_settings.Settings  # prepare
        self._disks: DiskGuard  # prepare
        self._carrier: ram_blocks.Carrier  # prepare
        self._incoming: IncomingState  # prepare
        self._outgoing: OutgoingState  # prepare
        self._threads: ThreadStates  # freeze; of the source
        self._destination_vm: int  # prepare; not under TCG
        self._loading: asyncio.Future[Any]  # load

    def _past_undoing(self) -> bool:
        return self._committed or self._moving

    async def _go(self) -> None:
        try:
            await self._do("check", self._check)
            await self._do("hold", self._hold)
            await self._do("prepare", self._prepare)
            await self._do("freeze", self._freeze)
            await self._do("share", self._share)
            await self._do("save", self._save)
            await self._do("load", self._load)
            await self._do("commit", self._commit)
            await self._do("resume", self._resume)
        except BaseException as err:
            failure = await self._in_full(self._explain(err))
            if not self._committed:
                await self._in_full(self._put_back(failure))
            if failure is err:
                raise
            raise failure from err
        await self._do("retire", self._retire)

    # -- before the guest is touched ---------------------------------------------------------------

    async def _check(self) -> None:
        options = self._options
        try:
            self._source_monitor = await self._resources.enter_async_context(await self._connect())
            self._source = QemuProcess.open(self._source_monitor.peer)
            self._resources.callback(self._source.close)
            self.report.source_pid = self._source.pid
            self.report.source_version = self._source_monitor.version
            self._watch = self._resources.enter_context(SourceWatch.begin(self._source_monitor))
            self._working_directory = self._source.working_directory
            verdict = await guest_checks.bare(self._source_monitor, self._source, options.emulator, options.command)
        except SevhopError as err:
            raise Refused(err.message, err.hint) from err
        self._guest = verdict.guest
        self._checked_disks = verdict.disks
        self._arguments = verdict.arguments
        self.report.emulator = self._arguments.emulator
        self.report.guest = self._guest.name
        self.report.context = self._guest.context.kind
        self._by_itself = (
            self._guest.state == "running"
            and self._guest.context.kind == "none"
            # A QEMU that lets the guest run by itself takes the images first, and marks dirty bitmaps in there as in
            # use. If it was ended then, they could not be used any more.
            and not verdict.disks.bitmaps()
        )
        if failures := verdict.tree.failures():
            first = failures[0]
            raise Refused(f"{first.name}: {first.detail}", first.remedy)
        await self._begin_journal(
            Entry(
                kind="bare",
                guest=self._guest.name,
                context=self._guest.context.kind,
                running=self._guest.state == "running",
                source=Process.of(self._source),
                monitor=os.path.abspath(options.source),
                old=self._source.executable,
                new=self._arguments.emulator,
            )
        )

    async def _connect(self) -> Monitor:
        timeout = self._options.step_timeout
        try:
            return await Monitor.connect(self._options.source, timeout=timeout, greeting_timeout=timeout)
        except MonitorError:
            # An earlier hop may have left it halted, or nobody there at all.
            journal.expect_none(os.path.abspath(self._options.source))
            raise

    async def _hold(self) -> None:
        try:
            self._held = Held.take(self._source, self._guest)
        except RamError as err:
            if not self._source.alive:
                raise
            raise Refused(err.message, err.hint) from err
        self._resources.callback(self._held.close)
        self._surroundings = Surroundings.of(self._source)
        self._resources.callback(self._surroundings.close)
        self._plates = NamePlates.of(self._working_directory, self._held.listeners, self._arguments.pidfile)
        try:
            score = launch.oom_score_adj(self._source.pid)
        except OSError as err:
            raise ProcessError(f"process {self._source.pid} has ended") from err
        self._remember(plates=self._plates.as_facts(), oom_score_adj=score)

    async def _prepare(self) -> None:
        watch = Watch.start()
        self._resources.push_async_callback(watch.close)
        self._undo.callback(self._plates.take_back)
        self._undo.callback(self._stop_sparing_source)
        launch.spare(self._source.pid)
        # Undoing goes backwards: first the destination is ended, then the source goes on if it was stopped.
        self._undo.push_async_callback(self._continue_source)
        self._undo.push_async_callback(self._kill_destination)
        await self._leave_run_mark()
        pinned = await runtime_settings.pinned(self._arguments.arguments, self._source_monitor)
        self._arguments = replace(self._arguments, arguments=pinned)
        try:
            await self._start_destination()
        except SevhopError as err:
            if not (remote := self._checked_disks.remote()):
                raise
            raise SevhopError(f"{err.message}; {remote}, whose server may take one client only", err.hint) from err
        await self._compare()
        await self._carry_settings()
        watch.over(self._source.pid, self._destination.process.pid)
        self._outgoing = await self._resources.enter_async_context(OutgoingState(self._source_monitor, self._incoming))
        identity = self._surroundings.credentials
        await self._outgoing.arm(identity.uid, identity.gid)

    async def _leave_run_mark(self) -> None:
        """Give the source the mark that tells whether the guest has run in the destination: it outlives all others."""
        self._run_mark = RunMark.create()
        self._resources.callback(self._run_mark.close)
        fdset, _ = await self._source_monitor.add_fd(self._run_mark.fileno())
        self._resources.push_async_callback(self._remove_run_mark, fdset)
        self._remember(run_mark=self._run_mark.inode)

    async def _remove_run_mark(self, fdset: int) -> None:
        with contextlib.suppress(MonitorError, CommandError):
            await self._source_monitor.execute("remove-fd", {"fdset-id": fdset})

    async def _start_destination(self) -> None:
        self._keeper = self._resources.enter_context(
            Keeper(self._held, self._guest.context, self._run_mark, self._source)
        )
        self._destination = await Destination.start(
            self._arguments.emulator,
            self._arguments.arguments,
            self._surroundings,
            self._keeper,
            timeout=self._options.start_timeout,
            command_timeout=self._options.step_timeout,
            started=self._remember_destination,
            paused=not self._by_itself,
        )
        self.report.destination_pid = self._destination.process.pid
        self.report.destination_version = self._destination.monitor.version
        self._incoming = self._resources.enter_context(IncomingState(self._destination.monitor))
        await self._incoming.arm(device_state.head(self._guest.machine_type))
        # Whoever holds a VM keeps its context alive. If the destination dies behind the move, it will be in here.
        number = self._destination.process.vm_descriptor()
        if number is not None:
            self._destination_vm = self._destination.process.duplicate(number)
            self._resources.callback(os.close, self._destination_vm)

    def _remember_destination(self, process: QemuProcess, directory: Path) -> None:
        self._remember(destination=Process.of(process), directory=str(directory))

    async def _compare(self) -> None:
        """See that the destination is the same machine, on the same memory, and bring its other RAM blocks over."""
        theirs = self._theirs = await inspection.inspect(self._destination.monitor, self._destination.process)
        if found := inspection.differences(self._guest, theirs):
            raise Refused("; ".join(found), "give the destination the source's command line")
        await self._compare_processes()
        self._disks = await DiskGuard.over(self._source_monitor, self._source)
        self._resources.callback(self._disks.close)
        # Who gives a command line of their own may name block nodes as they like.
        found = await self._disks.differences(
            self._destination.monitor, self._destination.process, names=not self._options.command
        )
        if found:
            raise Refused(found[0], "give the destination the disks that the guest has now, or try again")
        encrypted = frozenset() if self._guest.context.kind == "none" else ENCRYPTED_BLOCKS
        pairs = ram_blocks.not_shared(self._guest.blocks, theirs.blocks, encrypted=encrypted)
        self._carrier = ram_blocks.Carrier(self._source, self._destination.process, pairs)
        await asyncio.to_thread(self._carrier.carry)

    async def _compare_processes(self) -> None:
        """See that the destination is confined and scheduled as the source is."""
        confined = Confinement.of(self._source)
        found = confinement.differences(confined, Confinement.of(self._destination.process))
        ours = await scheduling.Roles.of(self._source_monitor, self._source)
        theirs = await scheduling.Roles.of(self._destination.monitor, self._destination.process)
        found += scheduling.hand_over(ours, theirs)
        self._roles = ours, theirs
        if confined.filters and not found:
            try:
                found = await asyncio.to_thread(confinement.filters_lost, ours.quiet, theirs.quiet)
            except seccomp_filter.UnknownFilter as err:
                self._note(f"how strict the sandbox of the new QEMU is was not compared: {err.message}")
        if found:
            raise Refused("; ".join(found), "start the guest in a way that sevhop can repeat, or run sevhop as root")

    async def _carry_settings(self) -> None:
        """Set in the destination what was set in the source since its start, and refuse where that cannot be."""
        source, destination = self._source_monitor, self._destination.monitor
        lost, gained = await cpu_features.compare(source, await cpu_features.words(source), destination)
        if lost:
            raise Refused(lost, "choose another version of QEMU, or one with these features")
        self._settings = await runtime_settings.read(source, self._source)
        theirs = await runtime_settings.read(destination, self._destination.process)
        found = runtime_settings.differences(self._settings, theirs)
        if found and not self._options.command:  # who gives a whole command line may want it so
            raise Refused("; ".join(found), "give the destination's whole command line after --")
        notes = await runtime_settings.carry_over(self._settings, theirs, destination)
        for note in filter(None, [gained, *found, *notes]):
            self._note(note)

    # -- the guest is stopped ----------------------------------------------------------------------

    async def _freeze(self) -> None:
        await self._look_again()
        self._remember(stopped=self._guest.state == "running")
        threads = self._source.threads
        self._threads = self._resources.enter_context(self._source.thread_states())
        self._slack.enter_context(keeping_timer_slack(*threads, *self._destination.process.threads))
        self._carrier.carry()  # once more, so that little is left, and what is to be done then has just been done
        gc.freeze()  # what is there by now is not looked through again while the guest stands still
        readers = set(threads) - self._guest.vcpu_threads
        # Not all of the destination's: one may still be busy with its start, and would keep the guest waiting now.
        self._hurry.enter_context(urgent(self._destination.process.pid, *self._theirs.vcpu_threads))
        self._hurry_source([self._source.pid])
        self._watch.stopping()
        if self._guest.state == "running":
            self._begin_of_blackout()
            # The guest stands still by then, and a thread of the source reads the order to save. It goes before us.
            with self._source_monitor.at_the_first_word(lambda: self._hurry_source(readers)):
                stopped = asyncio.ensure_future(self._source_monitor.execute("stop"))
                # QEMU runs commands in their order, so this one need not wait for the answer.
                self._outgoing.begin(timeout=self._options.step_timeout)
                self._own_hurry.enter_context(urgent(0))
                await stopped
        else:
            await self._see_source_stopped()
            self._hurry_source(readers)
            self._outgoing.begin(timeout=self._options.step_timeout)
        self._hurry_source(self._guest.vcpu_threads)

    async def _look_again(self) -> None:
        """
        What was checked may have been changed by others while the destination was started.

        :raises SevhopError: it has been.
        """
        await inspection.see_unchanged(self._source_monitor, self._guest)
        now = await runtime_settings.read(self._source_monitor, self._source)
        if found := runtime_settings.changes(self._settings, now):
            raise SevhopError(f"{found} of the guest was changed by somebody else", "try again")
        if lost := scheduling.hand_over(*self._roles):
            raise SevhopError("; ".join(lost), "try again")
        await self._disks.see_unchanged(self._source_monitor)
        await self._watch.see_undisturbed()

    def _hurry_source(self, threads: Iterable[int]) -> None:
        self._hurry.enter_context(urgent(*threads, first=True))

    async def _see_source_stopped(self) -> None:
        status = await self._source_monitor.execute("query-status")
        if status["running"]:
            raise SevhopError("the source runs although it was stopped", "somebody else continues the guest")

    async def _share(self) -> None:
        # Meanwhile the source saves its state.
        self._outgoing.announce()
        self._carrier.carry()

    async def _save(self) -> None:
        await self._outgoing.pass_on(timeout=self._options.step_timeout)
        self._saved = True

    async def _load(self) -> None:
        # The destination is at the state meanwhile. A source that is halted cannot be asked about its disks any more.
        await self._disks.see_given_up(
            self._source_monitor, again=self._stopped_at is None, see_stopped=self._see_source_untouched
        )
        await self._halt_source()
        # Whatever was done to it until then, it has told us.
        await self._see_source_untouched()
        await self._end_stream()
        if self._by_itself:
            # What is left is the destination's to do. We would only stand in the way of the guest's processors.
            self._own_hurry.close()
        runs: asyncio.Future[Any] = asyncio.ensure_future(self._keeper.runs.wait())
        try:
            await asyncio.wait({self._loading, runs}, return_when=asyncio.FIRST_COMPLETED)
            if not runs.done():
                self._loading.result()
        finally:
            runs.cancel()
        # From here on all of the guest is in the destination; that the source may end does not matter any more.
        self._loaded = True
        if self._by_itself:
            if not self._keeper.runs.is_set() and not self._keeper.forbid():
                # QEMU stays paused if it cannot have the disk images, and says so nowhere else.
                why = " ".join(self._destination.said()[-2:]) or "for no reason that it tells"
                raise StateError(f"the destination does not let the guest run: {why}")
            self._commit_is_done()
        self._remember(loaded=True)

    async def _end_stream(self) -> None:
        self._stream_ended = True
        await self._outgoing.end(timeout=self._options.step_timeout)
        self._loading = asyncio.ensure_future(self._incoming.loaded(timeout=self._options.step_timeout))
        self._loading.add_done_callback(lambda task: task.cancelled() or task.exception())  # may not be waited for
        self._resources.callback(self._loading.cancel)

    async def _halt_source(self) -> None:
        """It has saved everything. From here on it executes nothing, whatever its monitors are told, by whomever."""
        self._resources.push_async_callback(self._hang_up_if_halted)
        self._source.halt()
        await self._disks.see_unchanged_when_stopped()  # which takes as long as its threads need
        if not await self._source.freeze(self._options.step_timeout, self._threads) and self._source.alive:
            raise SevhopError("the source cannot be halted")

    async def _hang_up_if_halted(self) -> None:
        if self._source.frozen:
            await self._source_monitor.close()  # nobody is to wait for what it does not answer

    async def _see_source_untouched(self) -> None:
        await self._watch.see_stopped(was_running=self._stopped_at is not None)

    async def _commit(self) -> None:
        if self._committed:
            return
        await self._see_source_untouched()
        if self._guest.context.kind != "none":
            await self._move_context()
        elif self._stopped_at is None:
            self._commit_is_done()  # it is to stay paused

    async def _move_context(self) -> None:
        assert self._held.vm is not None
        self._moving = True
        try:
            self.report.move = await self._move_from(self._held.vm)
        except MoveUncertain as err:
            # The kernel may have moved the context or not; either way there is only one direction left.
            self._commit_is_done()
            await self._finish_elsewhere(err)
        finally:
            self._moving = False
        self._commit_is_done()

    async def _move_from(self, vm: int) -> move.MoveReport:
        report = await move.move(
            self._destination.monitor,
            self._destination.process.pid,
            vm,
            deadline=self._options.move_deadline,
            tried=lambda attempt, number: self._tell(MoveTried(self._named, attempt, number)),
        )
        if report.restore_errno:
            self._commit_is_done()
            reason = f"vCPU registers could not be set: {os.strerror(report.restore_errno)}"
            self._remember(broken=reason)
            raise NeedsRecover(f"the context was moved, but {reason}")
        return report

    async def _finish_elsewhere(self, failure: SevhopError) -> None:
        """
        The destination failed when the context was on its way to it, or there. Start another one, which takes the
        context from wherever it is.

        :raises Lost: this one failed as well.
        """
        assert self._held.vm is not None
        self._note(f"{self._phase}: {failure.message}; going on in another process")
        self._options = replace(
            self._options,
            step_timeout=max(self._options.step_timeout, _PATIENCE),
            start_timeout=max(self._options.start_timeout, _PATIENCE),
        )
        image, moved_to = bytes(self._incoming.image), self._destination_vm
        try:
            await self._destination.kill()
            await self._start_destination()
            with contextlib.suppress(CommandError):
                there = await runtime_settings.read(self._destination.monitor, self._destination.process)
                await runtime_settings.carry_over(self._settings, there, self._destination.monitor)
            await self._schedule_once_more()
            theirs = await inspection.inspect(self._destination.monitor, self._destination.process)
            pairs = [(kept, theirs.blocks[kept.block.name]) for kept in self._carrier.kept()]
            await asyncio.to_thread(ram_blocks.put, pairs, self._destination.process)
            await self._incoming.write(image)
            self._incoming.end()
            await self._incoming.loaded(timeout=self._options.step_timeout)
            try:
                self.report.move = await self._move_from(self._held.vm)
            except MoveError as err:
                if err.errno != errno.EINVAL:
                    raise
                # The source has no context any more: the move had been done.
                self.report.move = await self._move_from(moved_to)
        except NeedsRecover:
            raise
        except SevhopError as err:
            await self._destination.kill()
            raise Lost(f"{failure.message}; another destination failed, too: {err.message}") from err

    async def _schedule_once_more(self) -> None:
        """Have the threads of another destination scheduled like those of the source, as far as that can be."""
        self._hurry.close()  # what was lent is not what they had
        self._slack.close()
        try:
            theirs = await scheduling.Roles.of(self._destination.monitor, self._destination.process)
            lost = scheduling.hand_over(self._roles[0], theirs)
        except ProcessError as err:
            lost = [f"how the old QEMU was scheduled cannot be told: {err.message}"]
        for text in lost:
            self._note(text)

    def _commit_is_done(self) -> None:
        self._committed = True
        self._undo.pop_all()
        self._remember(committed=True)

    async def _resume(self) -> None:
        if self._stopped_at is None:
            await self._activate("the paused guest takes its disks when it is resumed, not now")
            return
        if self._by_itself:
            await self._loading
        else:
            try:
                await self._let_run()
            except MonitorError as err:
                if not self._committed:
                    raise
                await self._see_not_run(err)
                await self._finish_elsewhere(err)
                await let_run(self._destination.monitor)
        self._hurry.close()
        self._own_hurry.close()
        self._end_of_blackout()

    async def _see_not_run(self, failure: SevhopError) -> None:
        """
        See that the guest has not run in a destination that failed, and cannot any more.

        :raises NeedsRecover: it has, in there, or may have.
        :raises Lost: it has, and ended with it.
        """
        destination = self._destination.process
        await destination.freeze(self._options.step_timeout)
        if self._run_mark.read() is RunState.NOT:
            return
        if destination.alive:
            destination.thaw()
            raise NeedsRecover(f"{failure.message}; the guest is in process {destination.pid}")
        self._source.kill()
        await self._destination.kill()
        raise Lost(f"{failure.message}; the guest has run in the new QEMU, which has ended")

    async def _let_run(self) -> None:
        """Tell the destination to run. Without an SEV context that is the commit, and what it says to the keeper."""
        if self._committed:
            await let_run(self._destination.monitor)
            return
        await asyncio.sleep(0)  # who has interrupted us is heard now, or comes too late
        self._moving = True  # from here on it must not be killed: it takes the images
        try:
            await self._destination.monitor.execute("cont")
        finally:
            self._moving = False
        if not self._keeper.forbid():
            raise StateError("the destination does not let the guest run")
        self._commit_is_done()

    async def _note_bitmaps(self, monitor: Monitor) -> None:
        for text in await self._disks.lost_bitmaps(monitor):
            self._note(text)

    async def _activate(self, otherwise: str) -> None:
        """
        Have the destination take images that it has no reason to take by itself.

        :param otherwise: what is noted if it cannot.
        """
        try:
            await block_graph.activate(self._destination.monitor)
        except SevhopError as err:
            self._note(f"{otherwise}: {err.message}")

    # -- putting back ------------------------------------------------------------------------------

    async def _put_back(self, failure: SevhopError) -> None:
        """
        Unwind what has been done so far.

        :raises NeedsRecover: the guest does not run again, but nothing of it is lost.
        :raises Lost: its QEMU has ended, and nobody else had all of it.
        """
        if self._saved and not self._source.alive:
            await self._wait_for_arrival()
        if hasattr(self, "_keeper") and self._keeper.forbid():
            self._commit_is_done()
            await self._destination.leave()
            raise NeedsRecover(f"{failure.message}; the guest runs in process {self._destination.process.pid} already")
        if self._saved and not self._source.alive and self._destination.process.alive:
            # All that is left of the guest is in the destination. Leave it there, paused.
            self._undo.pop_all()
            pid = self._destination.process.pid
            await self._destination.leave()
            raise NeedsRecover(f"{failure.message}; the source has ended, the guest is in process {pid}")
        try:
            await self._undo.aclose()
        except SevhopError as err:
            raise NeedsRecover(f"{failure.message}; putting back failed: {err.message}") from failure
        if hasattr(self, "_source") and not self._source.alive:
            raise Lost(f"{failure.message}; the source's QEMU ended by itself, and the guest with it")
        self._end_of_blackout()

    async def _wait_for_arrival(self) -> None:
        """The source has ended, so all that there is of the guest is on its way into the destination. Let it arrive."""
        with contextlib.suppress(SevhopError):
            if not self._stream_ended:
                await self._end_stream()
            if hasattr(self, "_loading"):
                await asyncio.wait({self._loading}, timeout=_PATIENCE)

    def _stop_sparing_source(self) -> None:
        assert self._journal is not None
        with contextlib.suppress(OSError):  # it has ended
            launch.set_oom_score_adj(self._source.pid, self._journal.entry.oom_score_adj)

    async def _kill_destination(self) -> None:
        if not hasattr(self, "_destination"):
            return
        if self._run_mark.read() is not RunState.NOT:
            # It has been told that it may not, and is about to end; or somebody else has let it run.
            await self._destination.process.wait(self._options.step_timeout)
            if self._run_mark.read() is not RunState.NOT:
                raise SevhopError(f"the guest has run in process {self._destination.process.pid}")
        if hasattr(self, "_disks") and self._loaded and self._disks.graph.bitmaps():
            # It may have taken the images, and ends in good order: it leaves the bitmaps as they were.
            with contextlib.suppress(MonitorError, CommandError):
                await self._destination.monitor.execute("quit")
                await self._destination.process.wait(self._options.step_timeout)
        await self._destination.kill()

    async def _continue_source(self) -> None:
        if not self._source.alive:
            return
        if hasattr(self, "_destination") and self._destination.process.alive:
            raise SevhopError("the destination is still there, so the source stays paused")
        self._source.thaw()
        if not hasattr(self, "_outgoing"):
            return
        begun = await self._outgoing.abandon()
        self._hurry.close()
        if self._stopped_at is not None:
            # An answer to this is behind all that came of our order to stop, however late that was carried out.
            patience = max(CONT_DEADLINE, self._source_monitor.timeout)
            await self._source_monitor.execute("query-status", timeout=patience)
        if self._stopped_at is not None and await self._watch.stopped_by_us():
            await let_run(self._source_monitor)
        elif begun:
            # It has given up its images, but its guest is not ours to resume.
            await block_graph.activate(self._source_monitor)
            self._stopped_at = None
        if self._disks.spares_given_up:
            await block_graph.activate(self._source_monitor)
        if begun:
            await self._note_bitmaps(self._source_monitor)

    async def _explain(self, error: BaseException) -> SevhopError:
        """What is raised in the end for an error in some phase."""
        if isinstance(error, asyncio.CancelledError):
            return Interrupted("interrupted")
        if isinstance(error, (Refused, NeedsRecover, Lost)):
            return error
        error = expected(error)
        message = f"{self._phase}: {error.message}"
        if self._committed:
            return NeedsRecover(message, error.hint)
        if not self._loaded and not self._source.alive:
            return Lost(f"{self._phase}: the source's QEMU ended by itself, and the guest with it")
        lost_contact = isinstance(error, (MonitorError, ProcessError, RamError, StateError))
        hung_up = isinstance(error, (MonitorClosed, StateError))
        if hung_up and hasattr(self, "_destination") and not self._source_monitor.closed:
            await self._destination.process.wait(1.0)  # it is about to end, and then it has said why
        if lost_contact and hasattr(self, "_destination") and not self._destination.process.alive:
            words = self._destination.last_words()
            message = f"{self._phase}: the destination ended" + (f": {words}" if words else "")
        return Undone(message, error.hint)

    # -- behind the commit -------------------------------------------------------------------------

    async def _retire(self) -> None:
        """
        Nothing here can hurt the guest.

        :raises NeedsRecover: the destination has ended. What is to become of the source depends on what had run there.
        """
        if not self._destination.process.alive:
            raise NeedsRecover("retire: the new QEMU has ended")
        assert self._journal is not None
        self._destination.protect(self._journal.entry.oom_score_adj, self._note)
        if self._disks.graph.spare():
            await self._activate("block nodes that no device has are not in use")
        await self._note_bitmaps(self._destination.monitor)
        self._unfinished = not await retire(
            self._source,
            self._destination,
            self._plates,
            context=self._guest.context.kind,
            timeout=self._options.step_timeout,
            note=self._note,
        )


async def retire(
    source: QemuProcess | None,
    destination: Destination,
    plates: NamePlates,
    *,
    context: str,
    timeout: float,
    note: Callable[[str], None],
) -> bool:
    """
    The guest runs in the destination: kill the source, if it is still there, and let its name plates lead to the
    destination. May be repeated.

    The source is not asked to quit: nothing of the guest is left for it to do, and it would tell its clients of a
    shutdown that is none, and remove the paths of sockets that are the destination's.

    :param context: of the guest.
    :param timeout: seconds in which the source must have ended.
    :param note: told what went wrong; none of it matters to the guest.
    :return: whether the destination has been let go. Otherwise its sockets do not answer yet, and this should be
        repeated; or it has ended, and the source was left as it is.
    """
    if not destination.process.alive:
        note("the new QEMU has ended")
        await destination.monitor.close()
        return False
    if source is not None:
        plates.keep()
        source.kill()
        if not await source.wait(timeout):
            note("the source was killed and has not ended yet")
    for text in plates.hand_over():
        note(text)
    if context != "none":
        # The firmware of an SEV guest was encrypted in place at launch, in pages of the source. A reset would execute
        # what is no code here, so a guest that reboots is shut down and can be started afresh.
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
    Give a source back to its owner that a hop may have stopped, with its disk images.

    :param running: whether a hop has stopped it. One that has shut down since, or had an I/O error, stays as it is.
    :return: its run state then.
    :raises SevhopError: it cannot go on.
    """
    status = await monitor.execute("query-status")
    state = str(status["status"])
    if running and state in STOPPED:
        await let_run(monitor)
        state = "running"
    elif not status["running"]:
        await block_graph.activate(monitor)
    await block_graph.activate_spares(monitor)
    return state


async def let_run(monitor: Monitor) -> None:
    """
    Let a guest run. Something else may hold its disk images for a moment, so a refusal is tried again for
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
            # One whose disk images could not be activated when it had loaded its state says yes, and stays as it is.
            status = await monitor.execute("query-status")
            if not status["running"]:
                raise CommandError("cont", f"the guest is {status['status']} all the same")
