"""
The keeper as a process of its own: it has the guest between the old QEMU, which is terminated, and the new one.

libvirt cannot have two domains of one UUID, so for a moment there is no QEMU at all. What is left of the guest then is
here (its memory, its VM, the RAM blocks that were private to the source) and in a save image (its device state). The
keeper has a session of its own and outlives the command that started it, and :mod:`sevhop.keeper.supervisor` restarts
it: in whatever state it is killed, its successor continues from the last checkpoint. The states, and what is allowed in
each, are in :mod:`sevhop.keeper.state`.

In its directory, which it makes and removes, are three sockets, all SOCK_SEQPACKET; peers are checked by SO_PEERCRED:

``control``   root's: the command that has started it, and the hook where that is a program of its own
``hook``      root's: the hook; see :mod:`sevhop.libvirt.hook_server`
``keeper``    QEMU's user's: adopt.so in the destination, which must be the first process that connected since the
              restore began; see :mod:`sevhop.keeper.handover`

Every request is idempotent: a client that lost its keeper without a reply repeats the request to the next one.

The commit happens here, requested by the hook at ``started begin``: the saved RAM blocks are written into the
destination and the SEV context is moved. The keeper has a duplicate of the destination's VM since before that, so that
the guest survives if that QEMU is killed before it runs. Whether it has run is in the run mark
(:mod:`sevhop_qmp.run_mark`), which the keeper shares. Only a guest that has not run there may be restored again:
otherwise what the keeper has is outdated.

The keeper also terminates the source: it stops that process (SIGSTOP), so that nobody can resume the guest any more,
verifies that nobody has since the state was saved (:mod:`sevhop_qmp.image_locks`), and only then kills it. Nothing is
lost by that: QEMU has given up its disk images, and they were flushed before. If somebody has, the source continues.

It exits on request; when the guest runs and no command is connected any more; and when the command goes away while the
source still has everything. SIGTERM terminates it unless the guest may exist nowhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Coroutine, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sevhop_qmp import adopt, move, ram_blocks
from sevhop_qmp.address_space import AddressSpace
from sevhop_qmp.errors import MonitorError, MonitorTimeout, MoveError, ProcessError, SevhopError
from sevhop_qmp.image_locks import ImageLocks
from sevhop_qmp.monitor import Monitor, peer_credentials
from sevhop_qmp.process import QemuProcess
from sevhop_qmp.ram_blocks import RamBlock, RamBlockCopy
from sevhop_qmp.run_mark import RunMark, RunState

from ..disks import block_graph
from ..disks.block_graph import BlockGraph
from ..disks.images import Images
from ..guest import runtime_settings
from ..libvirt import hook_server
from ..records.run_directory import claim, listening, remove
from .client import MESSAGE, KeeperConfig, KeeperError
from .handover import HandoverProtocol, SourceHandles
from .state import (
    FINISHED,
    KEEPER_NEEDED,
    RAN,
    SOURCE_GONE,
    State,
    after_destination_exit,
    exits_with_command,
    reason_against_commit,
    reason_against_namesake,
    reason_against_request,
    reason_against_restore,
    reason_against_start,
)
from .supervisor import FdStore, Supervisor, protect, rename

log = logging.getLogger(__name__)

#: Seconds within which a killed QEMU should have exited.
RETIRE_TIMEOUT = 10.0
#: Seconds for which a source's mappings stay when it has exited. The guest should run again by then.
_MAPPINGS_KEPT = 5.0
#: Seconds within which a destination's machine is complete, counted from when its monitor exists.
_MACHINE_TIMEOUT = 60.0
#: Seconds between two attempts to connect to that monitor.
_MONITOR_POLL = 0.005
#: Seconds between two attempts to reconnect to a destination that has hung up but has not exited.
_REACH_POLL = 0.05
#: Seconds between two reads of the run mark of one that sends no event.
_MARK_POLL = 1.0
#: Characters of the longest reason in a message, so that it fits however it is encoded.
_REASON = 400
#: Connections to one socket at a time. Two are needed; a client with more tries to exhaust our descriptors.
_CONNECTIONS = 32

# Names of descriptors: what was taken from the source, and what later checkpoints have beside other VMs.
_SOURCE_VM = "source"
_DESTINATION = "destination"
_SAVED_BLOCKS = "saved blocks"


@dataclass(frozen=True)
class _ProbedDestination:
    """
    A destination whose machine is complete.

    :ivar lost: CPU features that the source has and it does not have.
    """

    monitor: Monitor
    process: QemuProcess
    blocks: dict[str, RamBlock]
    disks: BlockGraph
    lost: str


class KeeperServer:
    """
    What the keeper has and what it does with it. Made once, before the first keeper is forked; each keeper begins with
    :meth:`restore`.

    :ivar reason: why the last restore failed.
    """

    def __init__(self, config: KeeperConfig, directory: Path, handles: SourceHandles) -> None:
        self._config = config
        self._directory = directory
        self._handles = handles
        self._run_mark = RunMark.create()
        self._emulator = config.emulator
        self._source = QemuProcess.open(config.pid)
        self._locks = ImageLocks.of(self._source)
        self._images = None if config.disks is None else Images(config.disks, self._source)
        self._retiring = asyncio.Lock()
        self._command_process = QemuProcess.open(config.command)
        self._command_expected = True
        self._fd_store = FdStore({}, {})
        self._released = False
        self._kept: dict[str, RamBlockCopy] = {}
        self._kept_fd: int | None = None
        # VMs that the SEV context may be in, in the order in which they are tried.
        self._vms: dict[str, int] = {} if handles.source_vm_fd is None else {_SOURCE_VM: handles.source_vm_fd}
        self._move: move.MoveReport | None = None
        self._commit_ms = 0.0
        self._restore_began = 0.0
        self._until_started_ms = 0.0
        self._restorer: QemuProcess | None = None
        self._starting: QemuProcess | None = None
        self._destination: QemuProcess | None = None
        self._peer: int | None = None
        self._version = ""
        self._commands: set[socket.socket] = set()
        self._probing: asyncio.Task[_ProbedDestination] | None = None
        self._committing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self.state = State.HELD
        self.reason = ""
        self.end = asyncio.Event()

    # -- what outlives the keeper --------------------------------------------------------------------

    def restore(self, fd_store: FdStore) -> None:
        """
        Begin, where the last keeper was.

        :raises RamError: the RAM blocks that it had saved cannot be read.
        """
        self._fd_store = fd_store
        record, descriptors = fd_store.record, dict(fd_store.descriptors)
        if record:
            self.state = State(record["state"])
            self.reason = record["reason"]
            self._emulator = record["emulator"]
            self._released = record["released"]
            self._peer = record["peer"]
            self._version = record["version"]
            self._restore_began = record["restore_began"]
            self._until_started_ms, self._commit_ms = record["until_started_ms"], record["commit_ms"]
            self._move = move.MoveReport(**record["move"]) if record["move"] else None
            if record["destination"]:
                self._destination = QemuProcess(record["destination"], descriptors.pop(_DESTINATION))
            if (kept := descriptors.pop(_SAVED_BLOCKS, None)) is not None:
                self._kept_fd = kept
                self._kept = ram_blocks.unpack(kept, self._blocks_to_save())
            self._vms = {name: (self._vms | descriptors)[name] for name in record["vms"]}
        if self._released:
            self.end.set()
        self._start(self._watch_command())
        if self.state is State.RETIRING:
            self._start(self._finish_retiring())
        elif self.state is State.RESTORING:
            # libvirt may still be restoring. If a request of the hook was interrupted it was refused, and libvirt will
            # restore again.
            self._expect_destination()
        elif self.state is State.COMMITTED and self._destination is not None:
            self._start(self._until_it_runs(self._destination, None))

    def _checkpoint(self) -> None:
        """Store the state: whatever comes next is done by this keeper or by its successor."""
        descriptors = {name: fd for name, fd in self._vms.items() if name != _SOURCE_VM}
        if self._kept_fd is not None:
            descriptors[_SAVED_BLOCKS] = self._kept_fd
        if self._destination is not None:
            descriptors[_DESTINATION] = self._destination.fileno()
        record = {
            **self._status(),
            "released": self._released,
            "peer": self._peer,
            "restore_began": self._restore_began,
            "vms": list(self._vms),
        }
        self._fd_store.store(record, descriptors, needed=self.state in KEEPER_NEEDED and not self._released)

    def _enter(self, state: State) -> None:
        self.state = state
        self._checkpoint()

    # -- clients -------------------------------------------------------------------------------------

    # Each client is served by a task of its own.

    async def listen(self, listener: socket.socket, uid: int, serve: Any) -> None:
        """Serve all clients of a socket that run as a user, or as root."""
        loop = asyncio.get_running_loop()
        connected: set[asyncio.Task[None]] = set()
        while True:
            sock, _ = await loop.sock_accept(listener)
            if peer_credentials(sock)[1] not in (0, os.geteuid(), uid) or len(connected) >= _CONNECTIONS:
                sock.close()
                continue
            task = self._start(self._until_hangup(sock, serve))
            connected.add(task)
            task.add_done_callback(connected.discard)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _until_hangup(self, sock: socket.socket, serve: Any) -> None:
        loop = asyncio.get_running_loop()
        with sock, contextlib.suppress(OSError):
            sock.setblocking(False)
            while request := await loop.sock_recv(sock, MESSAGE):
                text, fd = await serve(sock, request)
                log.info("%r -> %s", request, text)
                socket.send_fds(sock, [_message(text)], [] if fd is None else [fd])
        if sock in self._commands:
            self._commands.discard(sock)
            if not self._commands and not self._command_expected:
                await self._on_command_gone()

    async def _watch_command(self) -> None:
        """Until it has connected, the command that has started us counts as connected while its process is alive."""
        await self._command_process.wait(float("inf"))
        expected, self._command_expected = self._command_expected, False
        if expected and not self._commands:
            await self._on_command_gone()

    def terminate(self) -> None:
        """On SIGTERM."""
        if self.state not in KEEPER_NEEDED:
            self.end.set()

    async def _on_command_gone(self) -> None:
        """The command is gone."""
        if exits_with_command(self.state):
            self.end.set()

    # -- adopt.so ----------------------------------------------------------------------------------

    async def answer_destination(self, sock: socket.socket, request: bytes) -> tuple[str, int | None]:
        """Answer adopt.so: only while libvirt restores the domain, with our hook, is there a destination."""
        if self.state is not State.RESTORING:
            return "error the hook of sevhop did not announce this QEMU", None
        pid = peer_credentials(sock)[0]
        if self._peer is None:
            self._peer = pid
            self._starting = _process(pid)
            self._checkpoint()
        elif self._peer != pid:
            return f"error process {self._peer} is the destination", None
        return HandoverProtocol(self._handles, self._config.context, self._run_mark, source_ended=True).answer(request)

    # -- the command and the hook ------------------------------------------------------------------

    async def answer_control(self, sock: socket.socket, request: bytes) -> tuple[str, int | None]:
        """A request and its arguments; never raises."""
        try:
            match request.decode().split(" "):
                case ["hook", operation, sub, uuid]:
                    return await self._hook(operation, sub, uuid, peer_credentials(sock)[0]), None
                case [name, *arguments]:
                    self._commands.add(sock)
                    if peer_credentials(sock)[0] == self._config.command:
                        self._command_expected = False
                    return await self._command(name, " ".join(arguments)), None
        except UnicodeDecodeError:
            pass
        except SevhopError as err:
            return f"error {err}", None
        except Exception as err:
            log.exception("%r", request)
            return f"error unexpected {type(err).__name__}: {err}", None
        return "error invalid request", None

    async def answer_hook(self, sock: socket.socket, request: str) -> str:
        """The same for a hook whose call was forwarded."""
        return (await self.answer_control(sock, request.encode()))[0]

    async def _command(self, request: str, argument: str) -> str:
        match request:
            case "status":
                return f"ok {json.dumps(self._status() | {'reason': self.reason[:_REASON]})}"
            case "blocks" if self.state is State.HELD:
                self._keep_blocks()
                return "ok"
            case "retire":
                return await self._retire()
            case "emulator" if argument:
                self._emulator = argument
                self._checkpoint()
                return "ok"
            case "revoke" if not self._committing.locked():
                return await self._revoke()
            case "release":
                self._released = True
                self._checkpoint()
                # Not before the reply, which is sent without a pause in this task, is on its way.
                asyncio.get_running_loop().call_soon(self.end.set)
                return "ok"
        return f"error {reason_against_request(self.state, request)}"

    async def _revoke(self) -> str:
        """Make sure that a restore which has failed does not let the guest run after all."""
        destination = self._destination
        if self.state is State.COMMITTED and destination is not None:
            # It is about to run the guest, or has, or never will; and may be too busy to answer.
            await destination.freeze(self._config.step_timeout)
            if self._has_run():
                destination.thaw()
                return f"error {RAN}"
            destination.kill()
            if not await destination.wait(RETIRE_TIMEOUT):
                return f"error process {destination.pid} (the destination) was killed and has not exited yet"
            self._destination = None
            self._enter(State.WAITING)
        if self.state is State.RESTORING and not self._has_run():
            self._enter(State.WAITING)
        return "ok" if self.state is State.WAITING else f"error {reason_against_request(self.state, 'revoke')}"

    async def _retire(self, *, begun: bool = False) -> str:
        """
        Terminate the source, unless somebody has resumed it since its state was saved.

        :param begun: only if the last keeper had begun it, and nobody has finished it since.
        """
        async with self._retiring:
            if self.state in SOURCE_GONE or (begun and self.state is not State.RETIRING):
                return "ok"
            self._enter(State.RETIRING)
            refusal = ""
            # One that has exited unexpectedly has nothing that is not saved.
            if not await self._source.freeze(self._config.step_timeout):
                if self._source.alive:
                    refusal = f"error cannot stop process {self._source.pid}, the source"
            elif self._locks.known and not self._locks.given_up:
                refusal = "error another client has resumed the guest"
            elif self._locks.kept():
                refusal = "error the source has not given up all of its disks"
            elif self._images is not None and self._images.files.changed():
                refusal = "error another client has changed the disks"
            if refusal:
                self._source.thaw()
                self._enter(State.HELD)
                return refusal
            self._keep_mappings()
            self._source.kill()
            # It executes nothing any more; but one in an uninterruptible wait for a disk is still there, and the
            # destination may need that disk.
            while not await self._source.wait(RETIRE_TIMEOUT):
                log.warning("process %d (the source) was killed and has not exited yet", self._source.pid)
            self._locks.close()
            if self._images is not None:
                self._images.close()
            self._enter(State.WAITING)
            return "ok"

    def _keep_mappings(self) -> None:
        """So that nobody waits until the kernel has unmapped all the guest's memory."""
        try:
            mappings = AddressSpace(self._source.pid)
        except ProcessError as err:
            log.info("%s", err)
        else:
            asyncio.get_running_loop().call_later(_MAPPINGS_KEPT, mappings.close)

    async def _finish_retiring(self) -> None:
        """What the last keeper had begun. The command, if there is one, repeats its request and gets the same reply."""
        await self._retire(begun=True)
        if not self._commands and not self._command_expected:
            await self._on_command_gone()

    def _blocks_to_save(self) -> list[RamBlock]:
        return [block for block in self._config.blocks if block.name not in self._config.encrypted]

    def _keep_blocks(self) -> None:
        self._kept = ram_blocks.copy(self._source, self._blocks_to_save())
        if self._kept_fd is not None:
            os.close(self._kept_fd)
        self._kept_fd = ram_blocks.pack(self._kept.values())
        self._checkpoint()

    def _status(self) -> dict[str, object]:
        return {
            "state": self.state.value,
            "name": self._config.name,
            "uuid": self._config.uuid,
            "image": str(self._directory / "image"),
            "emulator": self._emulator,
            "destination": self._destination.pid if self._destination else 0,
            "version": self._version,
            "until_started_ms": self._until_started_ms,
            "commit_ms": self._commit_ms,
            "move": asdict(self._move) if self._move else None,
            "reason": self.reason,
        }

    async def _hook(self, operation: str, sub: str, uuid: str, pid: int) -> str:
        if uuid.lower() != self._config.uuid.lower():
            reason = reason_against_namesake(self.state, operation, sub, self._config.uuid, self._directory / "image")
            return f"error {reason}" if reason else "foreign"
        if reason := reason_against_start(self.state, operation, sub, self._directory / "image"):
            return f"error {reason}"
        match operation, sub:
            case "restore", "begin":
                if self._committing.locked() or (not self._has_run() and not self._kill_orphan()):
                    return "error the guest is being restored already"
                if reason := reason_against_restore(self.state, has_run=self._has_run()):
                    return f"error {reason}"
                self.reason = ""
                verdict = "again" if self._restore_began else "ok"
                self._restore_began = time.monotonic()
                self._restorer = _parent(pid)
                self._destination = self._peer = None
                self._enter(State.RESTORING)
                self._clear_monitor()
                self._expect_destination()
                return f"{verdict} {self._emulator}"
            case "started", "begin" if self.state not in FINISHED:
                return await self._started()
        return "ok"

    def _kill_orphan(self) -> bool:
        """
        Kill a destination that can never run, since the daemon that was restoring it has died.

        :return: False when there is one that can.
        """
        if self._destination is not None and self._destination.alive:
            return False
        if self._starting is not None and self._starting.alive:
            if self._restorer is None or self._restorer.alive:
                return False
            self._starting.kill()
        self._starting = None
        return True

    def _has_run(self) -> bool:
        """Whether the guest has run in a destination, also in one that has exited since."""
        return self._run_mark.read() is not RunState.NOT

    # -- commit ------------------------------------------------------------------------------------

    async def _started(self) -> str:
        """Commit, if that is due. :return: ``ok`` if and only if the guest may run."""
        committing = self._committing.locked()
        if reason := reason_against_commit(self.state, has_run=self._has_run(), committing=committing):
            return f"error {reason}"
        async with self._committing:
            began = time.monotonic()
            self._until_started_ms = (began - self._restore_began) * 1e3
            try:
                assert self._probing is not None
                async with asyncio.timeout(self._config.step_timeout):
                    probed = await self._probing
                try:
                    await self._commit(probed)
                except BaseException:
                    await probed.monitor.close()
                    raise
            except TimeoutError as err:
                self.reason = "the destination's monitor does not answer"
                raise KeeperError(self.reason) from err
            except SevhopError as err:
                self.reason = str(err)
                raise
            finally:
                self._commit_ms = (time.monotonic() - began) * 1e3
            self._destination = probed.process
            self._enter(State.COMMITTED)
            self._start(self._until_it_runs(probed.process, probed.monitor))
        return "ok"

    def _clear_monitor(self) -> None:
        """Remove the socket of a destination that has exited. It is where QEMU's user may create anything."""
        path = self._directory / "monitor" / "qmp"
        try:
            path.unlink(missing_ok=True)
        except OSError as err:
            raise KeeperError(f"cannot remove {path}: {err.strerror}") from err

    def _expect_destination(self) -> None:
        """Query the destination while libvirt still sets it up, not after: that takes time, too."""
        if self._probing is not None:
            self._probing.cancel()
        self._probing = asyncio.ensure_future(self._probe(self._directory / "monitor" / "qmp"))
        # A destination that never starts is reported by libvirt.
        self._probing.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _probe(self, path: Path) -> _ProbedDestination:
        while True:
            try:
                # It answers when its machine is complete.
                monitor = await Monitor.connect(
                    path, timeout=self._config.step_timeout, greeting_timeout=_MACHINE_TIMEOUT
                )
                break
            except MonitorError as err:
                # bind() precedes listen(): retry ENOENT and ECONNREFUSED.
                if not isinstance(err.__cause__, (FileNotFoundError, ConnectionRefusedError)):
                    raise
            await asyncio.sleep(_MONITOR_POLL)
        destination = QemuProcess.open(monitor.peer)
        # QEMU's user may create anything in place of that socket, but not a process of another user.
        if destination.credentials.uid not in (0, self._config.uid):
            await monitor.close()
            raise KeeperError(f"the destination's monitor is served by process {monitor.peer} of another user")
        try:
            lost = await runtime_settings.set_before_it_runs(self._directory, monitor)
            blocks = await ram_blocks.read(monitor, destination)
            return _ProbedDestination(monitor, destination, blocks, await block_graph.read(monitor), lost)
        except BaseException:
            await monitor.close()
            raise

    async def _commit(self, probed: _ProbedDestination) -> None:
        monitor, destination = probed.monitor, probed.process
        self._version = monitor.version
        status = await adopt.adopt_status(monitor)
        if status.source != "ended" or status.ram != "shared":
            raise KeeperError(f"the destination has not adopted the guest's memory (it is {status.ram})")
        if destination.pid != self._peer:
            raise KeeperError(f"process {destination.pid} has the monitor, but {self._peer} asked for the memory")
        if (await monitor.execute("query-status"))["running"]:
            raise KeeperError("the destination runs already")
        if probed.lost:
            raise KeeperError(probed.lost)
        self._compare_disks(probed)
        source = {block.name: block for block in self._config.blocks}
        pairs = ram_blocks.private_pairs(source, probed.blocks, encrypted=frozenset(self._config.encrypted))
        ram_blocks.write(((self._kept[theirs.name], ours) for theirs, ours in pairs), destination)
        if self._config.context.kind != "none":
            await self._move_context(monitor, destination)
        await adopt.finish(monitor)

    def _compare_disks(self, probed: _ProbedDestination) -> None:
        """:raises KeeperError: the destination has other disks than the source had."""
        if self._config.disks is None or self._images is None:
            return
        found = block_graph.differences(self._config.disks, probed.disks, names=False)
        if found := found or self._images.others_of(probed.disks, probed.process):
            raise KeeperError(found[0])

    async def _move_context(self, monitor: Monitor, destination: QemuProcess) -> None:
        """
        Move the SEV context, and keep the VM that has it then. That VM is duplicated and stored before, since any
        process may be killed meanwhile.
        """
        descriptor = destination.vm_descriptor()
        if descriptor is None or not self._vms:
            raise KeeperError("cannot move the SEV context: source or destination has no KVM VM")
        before = dict(self._vms)
        name = next(name for number in itertools.count(1) if (name := f"vm {number}") not in before)
        self._vms[name] = destination.duplicate(descriptor)
        self._checkpoint()
        try:
            self._move = await self._move_from(before, monitor, destination)
        except MonitorError:
            # The destination exited during the move. The next attempt finds out which VM has the context.
            raise
        except SevhopError:
            self._forget_vms([name])
            raise
        self._forget_vms(before)
        if self._move.restore_errno:
            reason = os.strerror(self._move.restore_errno)
            raise KeeperError(f"the context was moved, but vCPU registers could not be set: {reason}")
        # The firmware was encrypted in place at launch, in pages of the source: a reset would execute garbage.
        await monitor.execute("set-action", {"reboot": "shutdown"})

    async def _move_from(self, vms: Mapping[str, int], monitor: Monitor, destination: QemuProcess) -> move.MoveReport:
        """From the first of these VMs that has the context. One that has none any more fails with EINVAL, or EIO."""
        failure = MoveError("no VM has the SEV context", errno.EINVAL)
        for vm in vms.values():
            try:
                return await move.move(monitor, destination.pid, vm, deadline=self._config.move_deadline)
            except MoveError as err:
                if err.errno not in (errno.EINVAL, errno.EIO):
                    raise
                failure = err
        raise failure

    def _forget_vms(self, names: Iterable[str]) -> None:
        for name in names:
            os.close(self._vms.pop(name))
        self._checkpoint()

    async def _until_it_runs(self, destination: QemuProcess, monitor: Monitor | None) -> None:
        """
        After the commit, until the guest runs or its QEMU has exited.

        :param monitor: None when it must be connected again.
        """
        while destination.alive:
            try:
                if monitor is None and not self._has_run():
                    monitor = await self._reach(destination)
                if monitor is not None:
                    await self._wait_running(monitor)
            except SevhopError as err:
                log.info("the destination does not respond: %s", err)
                monitor = None
                await destination.wait(_REACH_POLL)
                continue
            self._finish(State.OVER)
            return
        # The next restore may have begun.
        if self.state is State.COMMITTED and self._destination is destination:
            self._destination = None
            state, self.reason = after_destination_exit(has_run=self._has_run())
            if state in FINISHED:
                self._finish(state)
            else:
                self._enter(state)

    def _finish(self, state: State) -> None:
        self._enter(state)
        if not self._commands and not self._command_expected:
            self.end.set()

    async def _reach(self, destination: QemuProcess) -> Monitor:
        path = self._directory / "monitor" / "qmp"
        monitor = await Monitor.connect(path, timeout=self._config.step_timeout)
        if monitor.peer != destination.pid:
            await monitor.close()
            raise KeeperError(f"process {monitor.peer} has the destination's monitor")
        return monitor

    async def _wait_running(self, monitor: Monitor) -> None:
        """Also by the run mark: the guest may have been stopped again, or its QEMU may send no event."""
        async with monitor:
            with monitor.events("RESUME") as events:
                while not (self._has_run() or (await monitor.execute("query-status"))["running"]):
                    with contextlib.suppress(MonitorTimeout):
                        await monitor.next_event(events, timeout=_MARK_POLL)


def _message(text: str) -> bytes:
    """The reply as it is sent: truncated to the maximum, but not inside a character."""
    return text.encode(errors="backslashreplace")[:MESSAGE].decode(errors="ignore").encode()


def _process(pid: int) -> QemuProcess | None:
    try:
        return QemuProcess.open(pid)
    except ProcessError:
        return None


def _parent(pid: int) -> QemuProcess | None:
    """The parent of a process, unless it has exited."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    return _process(int(stat.rpartition(")")[2].split()[1]))


def _keep(config: KeeperConfig, directory: Path) -> None:
    """Take everything from the source, report that, and supervise the keepers that have it."""
    source = QemuProcess.open(config.pid)
    handles = SourceHandles.take_machine(source, config.blocks)
    source.close()
    monitor = directory / "monitor"
    monitor.mkdir(mode=0o700)
    os.chown(monitor, config.uid, config.gid)
    server = KeeperServer(config, directory, handles)
    control = listening(directory / "control", os.geteuid())
    hook = listening(directory / hook_server.SOCKET, os.geteuid())
    keeper = listening(directory / "keeper", config.uid)

    async def serve(fd_store: FdStore) -> None:
        server.restore(fd_store)
        await _until_end(
            server,
            server.listen(control, os.geteuid(), server.answer_control),
            server.listen(keeper, config.uid, server.answer_destination),
            hook_server.listen(hook, server.answer_hook),
        )
        # Whoever waits for our exit must not find anything left.
        remove(config.name, directory)

    def work(fd_store: FdStore) -> int:
        rename("sevhop-keeper")
        asyncio.run(serve(fd_store))
        return 0

    print(f"ready {directory}", flush=True)
    _detach()
    Supervisor(work).run()


async def _until_end(server: KeeperServer, *listening: Coroutine[Any, Any, None]) -> None:
    """Serve until the keeper is not needed any more. One that cannot listen exits, and its successor tries again."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.terminate)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    tasks = {asyncio.ensure_future(work) for work in (server.end.wait(), *listening)}
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()


def _detach() -> None:
    """Close what was inherited from the command: it waits for the end of our output."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    os.close(null)


def main() -> int:
    """The process, which becomes the supervisor."""
    protect()
    rename("sevhop-supervisor")
    logging.basicConfig(level=logging.CRITICAL)
    try:
        config = KeeperConfig.from_json(sys.stdin.read())
        directory = claim(config.name, config.uuid)
        try:
            _keep(config, directory)
        finally:
            remove(config.name, directory)
    except SevhopError as err:
        print(err, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
