"""
The keeper as a process of its own: it carries a guest from a QEMU that has ended to one that libvirt starts.

libvirt cannot have two domains of one UUID, so for a moment there is no QEMU at all. What is left of the guest then is
here (its memory, its VM, the RAM blocks that were private to the source) and in a save image (its device state). The
keeper has a session of its own and outlives the command that started it, and :mod:`sevhop.keeper.supervisor` outlives
the keeper: in whatever state it is killed, its successor goes on from there. ::

    held ──> retiring ──> waiting ──restore begin──> restoring ──started begin──> committed ──the guest runs──> over
                             ^                          │                            │
                             └──────────────────────────┴── the destination died ────┴── it had run there ──> lost

In its directory, which it makes and removes, are three sockets, all SOCK_SEQPACKET, and peers are told by SO_PEERCRED:

``control``   root's: the command that has started it, and the hook where that is a program of its own
``hook``      root's: the hook; see :mod:`sevhop.libvirt.hook_server`
``keeper``    QEMU's user's: adopt.so in the destination, which must be the process that spoke first since the restore
              began; see :mod:`sevhop.keeper.handover`

Every request may be repeated: whoever does not know whether it was heard by a keeper that has died asks the next one.

The commit happens here, asked for by the hook at ``started begin``: the kept RAM blocks are written into the
destination and the SEV context is moved. The keeper holds the destination's VM since before that, so that the guest is
safe should that QEMU be killed before it runs. Whether it has run is told by the run mark (:mod:`sevhop_qmp.run_mark`),
which the keeper has, too. Only a guest that has not run there may be restored once more: otherwise what is held is of
the past.

It is the keeper, too, that ends the source: it halts that process, so that nobody can resume the guest any more, sees
that nobody has since the state was saved (:mod:`sevhop_qmp.image_locks`), and only then kills it. Nothing is lost by
that: QEMU has given up its disk images, and they were flushed before. If somebody has, the source goes on.

It ends when it is told to; when the guest runs and no command is connected any more; and when the command goes away
while the source still has everything. SIGTERM ends it unless the guest may exist nowhere else.
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
from sevhop_qmp.ram_blocks import KeptBlock, RamBlock
from sevhop_qmp.run_mark import RunMark, RunState

from ..disks import block_graph
from ..disks.block_graph import BlockGraph, Images
from ..guest import runtime_settings
from ..libvirt import hook_server
from ..records.run_directory import claim, listening, remove
from .client import MESSAGE, Brief, KeeperError, State
from .handover import Answers, Held
from .supervisor import Deposit, Guardian, protect, rename

log = logging.getLogger(__name__)

#: Seconds in which a source that was killed should have ended.
RETIRE_TIMEOUT = 10.0
#: Seconds for which a source's mappings stay when it has ended. The guest should run again by then.
_MAPPINGS_KEPT = 5.0
#: Seconds in which a destination's machine is complete, counted from when its monitor exists.
_MACHINE_TIMEOUT = 60.0
#: Seconds between two looks for that monitor.
_MONITOR_POLL = 0.005
#: Seconds between two attempts to reach a destination that has hung up but has not ended.
_REACH_POLL = 0.05
#: Seconds between two looks at the mark of one that tells nothing.
_MARK_POLL = 1.0
#: Characters of the longest reason in a message, so that it has room however it is written.
_REASON = 400
#: At one socket at a time. Needed are two; who wants more wants to use up our descriptors.
_CONNECTIONS = 32

#: Why a guest is not restored once more.
_RAN = "the guest has run in a new QEMU already"

# Names of descriptors: what was taken from the source, and what later deposits have beside other VMs.
_SOURCE_VM = "source"
_DESTINATION = "destination"
_KEPT = "kept blocks"

#: While the guest may exist nowhere but here.
_NEEDED = (State.RETIRING, State.WAITING, State.RESTORING, State.COMMITTED)
#: Behind the end of the source.
_ENDED = (State.WAITING, State.RESTORING, State.COMMITTED, State.OVER, State.LOST)
#: When the guest is the destination's, and nothing is held any more.
_DONE = (State.OVER, State.LOST)


@dataclass(frozen=True)
class _Met:
    """
    A destination whose machine is complete.

    :ivar lost: what its processors cannot do, and those of the source can.
    """

    monitor: Monitor
    process: QemuProcess
    blocks: dict[str, RamBlock]
    disks: BlockGraph
    lost: str


class Custody:
    """
    What the keeper holds and what it does with it. Made once, before the first keeper is forked; each begins with
    :meth:`take_up`.

    :ivar reason: why the last restore did not come to its end.
    """

    def __init__(self, brief: Brief, directory: Path, held: Held) -> None:
        self._brief = brief
        self._directory = directory
        self._held = held
        self._run_mark = RunMark.create()
        self._emulator = brief.emulator
        self._source = QemuProcess.open(brief.pid)
        self._locks = ImageLocks.of(self._source)
        self._images = None if brief.disks is None else Images(brief.disks, self._source)
        self._retiring = asyncio.Lock()
        self._command_process = QemuProcess.open(brief.command)
        self._command_expected = True
        self._deposit = Deposit({}, {})
        self._released = False
        self._kept: dict[str, KeptBlock] = {}
        self._kept_fd: int | None = None
        # VMs that the SEV context may be in, in the order in which they are tried.
        self._vms: dict[str, int] = {} if held.vm is None else {_SOURCE_VM: held.vm}
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
        self._meeting: asyncio.Task[_Met] | None = None
        self._committing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self.state = State.HELD
        self.reason = ""
        self.end = asyncio.Event()

    # -- what outlives the keeper --------------------------------------------------------------------

    def take_up(self, deposit: Deposit) -> None:
        """
        Begin, where the last keeper was.

        :raises RamError: what it had kept cannot be read.
        """
        self._deposit = deposit
        record, descriptors = deposit.record, dict(deposit.descriptors)
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
            if (kept := descriptors.pop(_KEPT, None)) is not None:
                self._kept_fd = kept
                self._kept = ram_blocks.unpack(kept, self._to_be_kept())
            self._vms = {name: (self._vms | descriptors)[name] for name in record["vms"]}
        if self._released:
            self.end.set()
        self._start(self._outlive_command())
        if self.state is State.RETIRING:
            self._start(self._finish_retiring())
        elif self.state is State.RESTORING:
            # libvirt may still be at it. If the hook was asking it was refused, and libvirt will restore again.
            self._expect_destination()
        elif self.state is State.COMMITTED and self._destination is not None:
            self._start(self._until_it_runs(self._destination, None))

    def _put_down(self) -> None:
        """Whatever comes next is done by this keeper or by its successor."""
        descriptors = {name: fd for name, fd in self._vms.items() if name != _SOURCE_VM}
        if self._kept_fd is not None:
            descriptors[_KEPT] = self._kept_fd
        if self._destination is not None:
            descriptors[_DESTINATION] = self._destination.fileno()
        record = {
            **self._status(),
            "released": self._released,
            "peer": self._peer,
            "restore_began": self._restore_began,
            "vms": list(self._vms),
        }
        self._deposit.put(record, descriptors, needed=self.state in _NEEDED and not self._released)

    def _enter(self, state: State) -> None:
        self.state = state
        self._put_down()

    # -- who is there --------------------------------------------------------------------------------

    # Whoever connects is served by a task of its own.

    async def listen(self, listener: socket.socket, uid: int, serve: Any) -> None:
        """Serve all who connect to a socket and run as a user, or as root."""
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
                if request == b"release":
                    self.end.set()
        if sock in self._commands:
            self._commands.discard(sock)
            if not self._commands and not self._command_expected:
                await self._left_alone()

    async def _outlive_command(self) -> None:
        """Until it has connected, the command that has started us is there for as long as its process lives."""
        await self._command_process.wait(float("inf"))
        expected, self._command_expected = self._command_expected, False
        if expected and not self._commands:
            await self._left_alone()

    def terminate(self) -> None:
        """Somebody wants us to end."""
        if self.state not in _NEEDED:
            self.end.set()

    async def _left_alone(self) -> None:
        """The command is gone. Whether we are needed without it depends on who has the guest."""
        if self.state in (State.HELD, *_DONE):
            self.end.set()

    # -- adopt.so ----------------------------------------------------------------------------------

    async def answer_destination(self, sock: socket.socket, request: bytes) -> tuple[str, int | None]:
        """Only while libvirt restores the domain, with our hook, is there a destination."""
        if self.state is not State.RESTORING:
            return "no the hook of sevhop did not announce this QEMU", None
        pid = peer_credentials(sock)[0]
        if self._peer is None:
            self._peer = pid
            self._starting = _process(pid)
            self._put_down()
        elif self._peer != pid:
            return f"no process {self._peer} is the destination", None
        return Answers(self._held, self._brief.context, self._run_mark, source_ended=True).answer(request)

    # -- the command and the hook ------------------------------------------------------------------

    async def answer_control(self, sock: socket.socket, request: bytes) -> tuple[str, int | None]:
        """One word and its arguments; never raises."""
        try:
            match request.decode().split(" "):
                case ["hook", operation, sub, uuid]:
                    return await self._hook(operation, sub, uuid, peer_credentials(sock)[0]), None
                case [word, *arguments]:
                    self._commands.add(sock)
                    if peer_credentials(sock)[0] == self._brief.command:
                        self._command_expected = False
                    return await self._command(word, " ".join(arguments)), None
        except UnicodeDecodeError:
            pass
        except SevhopError as err:
            return f"no {err}", None
        except Exception as err:
            log.exception("%r", request)
            return f"no unexpected {type(err).__name__}: {err}", None
        return "no this is not a request", None

    async def answer_hook(self, sock: socket.socket, request: str) -> str:
        """The same for a hook whose call was handed over."""
        return (await self.answer_control(sock, request.encode()))[0]

    async def _command(self, word: str, argument: str) -> str:
        match word:
            case "status":
                return f"ok {json.dumps(self._status() | {'reason': self.reason[:_REASON]})}"
            case "blocks" if self.state is State.HELD:
                self._keep_blocks()
                return "ok"
            case "retire":
                return await self._retire()
            case "emulator" if argument:
                self._emulator = argument
                self._put_down()
                return "ok"
            case "revoke" if not self._committing.locked():
                return await self._revoke()
            case "release":
                self._released = True
                self._put_down()
                return "ok"
        return f"no {word} is not possible while the guest is {self.state.value}"

    async def _revoke(self) -> str:
        """See to it that a restore which has come to nothing does not let the guest run after all."""
        destination = self._destination
        if self.state is State.COMMITTED and destination is not None:
            # It is about to run the guest, or has, or never will; and may be too busy to tell.
            await destination.freeze(self._brief.step_timeout)
            if self._has_run():
                destination.thaw()
                return f"no {_RAN}"
            destination.kill()
            if not await destination.wait(RETIRE_TIMEOUT):
                return "no the destination was killed and has not ended yet"
            self._destination = None
            self._enter(State.WAITING)
        if self.state is State.RESTORING and not self._has_run():
            self._enter(State.WAITING)
        return "ok" if self.state is State.WAITING else f"no the guest is {self.state.value}"

    async def _retire(self, *, begun: bool = False) -> str:
        """
        End the source, unless somebody has resumed it since its state was saved.

        :param begun: only if the last keeper had begun it, and nobody has finished it since.
        """
        async with self._retiring:
            if self.state in _ENDED or (begun and self.state is not State.RETIRING):
                return "ok"
            self._enter(State.RETIRING)
            refusal = ""
            # One that has ended by itself has nothing that is not saved.
            if not await self._source.freeze(self._brief.step_timeout):
                if self._source.alive:
                    refusal = "no the source cannot be halted"
            elif self._locks.known and not self._locks.given_up:
                refusal = "no somebody else has resumed the guest"
            elif self._locks.kept():
                refusal = "no the source has not given up all of its disks"
            elif self._images is not None and self._images.files.changed():
                refusal = "no somebody else has changed the disks"
            if refusal:
                self._source.thaw()
                self._enter(State.HELD)
                return refusal
            self._keep_mappings()
            self._source.kill()
            # It executes nothing any more; but one that waits for a disk is still there, and the disk may be needed.
            while not await self._source.wait(RETIRE_TIMEOUT):
                log.warning("the source was killed and has not ended yet")
            self._locks.close()
            if self._images is not None:
                self._images.close()
            self._enter(State.WAITING)
            return "ok"

    def _keep_mappings(self) -> None:
        """Nobody is to wait until the kernel has taken down those of all the guest's memory."""
        try:
            mappings = AddressSpace(self._source.pid)
        except ProcessError as err:
            log.info("%s", err)
        else:
            asyncio.get_running_loop().call_later(_MAPPINGS_KEPT, mappings.close)

    async def _finish_retiring(self) -> None:
        """What the last keeper had begun. The command, if there is one, asks again, and gets the same answer."""
        await self._retire(begun=True)
        if not self._commands and not self._command_expected:
            await self._left_alone()

    def _to_be_kept(self) -> list[RamBlock]:
        return [block for block in self._brief.blocks if block.name not in self._brief.encrypted]

    def _keep_blocks(self) -> None:
        self._kept = ram_blocks.keep(self._source, self._to_be_kept())
        if self._kept_fd is not None:
            os.close(self._kept_fd)
        self._kept_fd = ram_blocks.pack(self._kept.values())
        self._put_down()

    def _status(self) -> dict[str, object]:
        return {
            "state": self.state.value,
            "name": self._brief.name,
            "uuid": self._brief.uuid,
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
        if uuid.lower() != self._brief.uuid.lower():
            # Another domain of that name: one that was defined or created again without a UUID gets another one. Both
            # would have the same files, and libvirt could not have the held one back.
            starts = sub in ("begin", "afresh") and operation in ("prepare", "restore", "migrate")
            if starts and self.state is not State.OVER:
                go_on = f"go on with: virsh restore {self._directory / 'image'}"
                what = go_on if self.state in _ENDED else "wait for it, or run: sevhop recover"
                return f"no a hop holds this name for the domain with UUID {self._brief.uuid}; {what}"
            return "foreign"
        match operation, sub:
            case "restore", "begin":
                if self._committing.locked() or (not self._has_run() and not self._end_orphan()):
                    return "no the guest is being restored already"
                if self.state in (State.HELD, State.RETIRING):
                    return "no the guest has not been saved yet"
                if self.state is State.OVER:
                    return "no the guest runs"
                if self.state is State.LOST or self._has_run():
                    return f"no {_RAN}"
                self.reason = ""
                verdict = "again" if self._restore_began else "ok"
                self._restore_began = time.monotonic()
                self._restorer = _parent(pid)
                self._destination = self._peer = None
                self._enter(State.RESTORING)
                self._clear_monitor()
                self._expect_destination()
                return f"{verdict} {self._emulator}"
            case ("prepare", "begin") if self.state not in (State.HELD, State.RETIRING, State.WAITING):
                return "ok"
            case ("prepare", "begin" | "afresh") | ("migrate", "begin") if self.state not in _DONE:
                return f"no the guest is held; go on with: virsh restore {self._directory / 'image'}"
            case "started", "begin" if self.state not in _DONE:
                return await self._started()
        return "ok"

    def _end_orphan(self) -> bool:
        """
        End a destination that can never run, since the daemon that was restoring it has died.

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
        """Whether the guest has run in a destination, whatever has become of that."""
        return self._run_mark.read() is not RunState.NOT

    # -- commit ------------------------------------------------------------------------------------

    async def _started(self) -> str:
        """Commit, if that is due. :return: ``ok`` if and only if the guest may run."""
        if self._has_run():
            return f"no {_RAN}"
        if self.state is not State.RESTORING or self._committing.locked():
            return f"no the guest is {self.state.value}, there is nothing to start"
        async with self._committing:
            began = time.monotonic()
            self._until_started_ms = (began - self._restore_began) * 1e3
            try:
                assert self._meeting is not None
                async with asyncio.timeout(self._brief.step_timeout):
                    met = await self._meeting
                try:
                    await self._commit(met)
                except BaseException:
                    await met.monitor.close()
                    raise
            except TimeoutError as err:
                self.reason = "the destination's monitor does not answer"
                raise KeeperError(self.reason) from err
            except SevhopError as err:
                self.reason = str(err)
                raise
            finally:
                self._commit_ms = (time.monotonic() - began) * 1e3
            self._destination = met.process
            self._enter(State.COMMITTED)
            self._start(self._until_it_runs(met.process, met.monitor))
        return "ok"

    def _clear_monitor(self) -> None:
        """Remove that of a destination that has died. It lies where QEMU's user may put anything."""
        path = self._directory / "monitor" / "qmp"
        try:
            path.unlink(missing_ok=True)
        except OSError as err:
            raise KeeperError(f"{path} cannot be removed: {err.strerror}") from err

    def _expect_destination(self) -> None:
        """Get to know the destination while libvirt still sets it up: that takes time, too."""
        if self._meeting is not None:
            self._meeting.cancel()
        self._meeting = asyncio.ensure_future(self._meet(self._directory / "monitor" / "qmp"))
        # A destination that never comes up is libvirt's to tell of.
        self._meeting.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _meet(self, path: Path) -> _Met:
        while True:
            try:
                # It answers when its machine is complete.
                monitor = await Monitor.connect(
                    path, timeout=self._brief.step_timeout, greeting_timeout=_MACHINE_TIMEOUT
                )
                break
            except MonitorError as err:
                # A socket has a name before it has ears.
                if not isinstance(err.__cause__, (FileNotFoundError, ConnectionRefusedError)):
                    raise
            await asyncio.sleep(_MONITOR_POLL)
        destination = QemuProcess.open(monitor.peer)
        # QEMU's user may put anything in the monitor's place, but nobody else's.
        if destination.credentials.uid not in (0, self._brief.uid):
            await monitor.close()
            raise KeeperError(f"the destination's monitor is served by process {monitor.peer} of another user")
        try:
            lost = await runtime_settings.set_before_it_runs(self._directory, monitor)
            blocks = await ram_blocks.read(monitor, destination)
            return _Met(monitor, destination, blocks, await block_graph.read(monitor), lost)
        except BaseException:
            await monitor.close()
            raise

    async def _commit(self, met: _Met) -> None:
        monitor, destination = met.monitor, met.process
        self._version = monitor.version
        status = await adopt.adopt_status(monitor)
        if status.source != "ended" or status.ram != "shared":
            raise KeeperError(f"the destination has not adopted the guest's memory (it is {status.ram})")
        if destination.pid != self._peer:
            raise KeeperError(f"process {destination.pid} has the monitor, but {self._peer} asked for the memory")
        if (await monitor.execute("query-status"))["running"]:
            raise KeeperError("the destination runs already")
        if met.lost:
            raise KeeperError(met.lost)
        self._compare_disks(met)
        source = {block.name: block for block in self._brief.blocks}
        pairs = ram_blocks.not_shared(source, met.blocks, encrypted=frozenset(self._brief.encrypted))
        ram_blocks.put(((self._kept[theirs.name], ours) for theirs, ours in pairs), destination)
        if self._brief.context.kind != "none":
            await self._move_context(monitor, destination)
        await adopt.finish(monitor)

    def _compare_disks(self, met: _Met) -> None:
        """:raises KeeperError: the destination has other disks than the source had."""
        if self._brief.disks is None or self._images is None:
            return
        found = block_graph.differences(self._brief.disks, met.disks, names=False)
        if found := found or self._images.others_of(met.disks, met.process):
            raise KeeperError(found[0])

    async def _move_context(self, monitor: Monitor, destination: QemuProcess) -> None:
        """Move, and hold the VM in which the context is then. It is held before: nobody knows who dies meanwhile."""
        descriptor = destination.vm_descriptor()
        if descriptor is None or not self._vms:
            raise KeeperError("there is no KVM VM to move the context to, or from")
        before = dict(self._vms)
        name = next(name for number in itertools.count(1) if (name := f"vm {number}") not in before)
        self._vms[name] = destination.duplicate(descriptor)
        self._put_down()
        try:
            self._move = await self._move_from(before, monitor, destination)
        except MonitorError:
            # The destination died in the middle. Where the context is, is for the next attempt to find out.
            raise
        except SevhopError:
            self._forget_vms([name])
            raise
        self._forget_vms(before)
        if self._move.restore_errno:
            reason = os.strerror(self._move.restore_errno)
            raise KeeperError(f"the context was moved, but vCPU registers could not be set: {reason}")
        # The firmware was encrypted in place at launch, in pages of the source: a reset would execute what is no code.
        await monitor.execute("set-action", {"reboot": "shutdown"})

    async def _move_from(
        self, vms: Mapping[str, int], monitor: Monitor, destination: QemuProcess
    ) -> move.MoveReport:
        """From the first of these VMs that has the context. One that has none any more is EINVAL, or EIO."""
        failure = MoveError("there is no VM that could have the SEV context", errno.EINVAL)
        for vm in vms.values():
            try:
                return await move.move(monitor, destination.pid, vm, deadline=self._brief.move_deadline)
            except MoveError as err:
                if err.errno not in (errno.EINVAL, errno.EIO):
                    raise
                failure = err
        raise failure

    def _forget_vms(self, names: Iterable[str]) -> None:
        for name in names:
            os.close(self._vms.pop(name))
        self._put_down()

    async def _until_it_runs(self, destination: QemuProcess, monitor: Monitor | None) -> None:
        """
        Behind the commit, until the guest runs or its QEMU has ended.

        :param monitor: None when it must be reached anew.
        """
        while destination.alive:
            try:
                if monitor is None and not self._has_run():
                    monitor = await self._reach(destination)
                if monitor is not None:
                    await self._see_it_run(monitor)
            except SevhopError as err:
                log.info("the destination does not answer: %s", err)
                monitor = None
                await destination.wait(_REACH_POLL)
                continue
            self._done(State.OVER)
            return
        # The next restore may have begun.
        if self.state is State.COMMITTED and self._destination is destination:
            self._destination = None
            if self._has_run():
                self.reason = _RAN
                self._done(State.LOST)
            else:
                self.reason = "the destination ended before the guest ran"
                self._enter(State.WAITING)

    def _done(self, state: State) -> None:
        self._enter(state)
        if not self._commands and not self._command_expected:
            self.end.set()

    async def _reach(self, destination: QemuProcess) -> Monitor:
        path = self._directory / "monitor" / "qmp"
        monitor = await Monitor.connect(path, timeout=self._brief.step_timeout)
        if monitor.peer != destination.pid:
            await monitor.close()
            raise KeeperError(f"process {monitor.peer} has the destination's monitor")
        return monitor

    async def _see_it_run(self, monitor: Monitor) -> None:
        """It may have been stopped again, or tell nothing more, when we look."""
        async with monitor:
            with monitor.events("RESUME") as events:
                while not (self._has_run() or (await monitor.execute("query-status"))["running"]):
                    with contextlib.suppress(MonitorTimeout):
                        await monitor.next_event(events, timeout=_MARK_POLL)


def _message(text: str) -> bytes:
    """As it is sent: cut where it is too long, but not inside a character."""
    return text.encode(errors="backslashreplace")[:MESSAGE].decode(errors="ignore").encode()


def _process(pid: int) -> QemuProcess | None:
    try:
        return QemuProcess.open(pid)
    except ProcessError:
        return None


def _parent(pid: int) -> QemuProcess | None:
    """Whoever started a process, for as long as that one waits for it."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    return _process(int(stat.rpartition(")")[2].split()[1]))


def _keep(brief: Brief, directory: Path) -> None:
    """Take everything, say so, and have keepers keep it."""
    source = QemuProcess.open(brief.pid)
    held = Held.take_machine(source, brief.blocks)
    source.close()
    monitor = directory / "monitor"
    monitor.mkdir(mode=0o700)
    os.chown(monitor, brief.uid, brief.gid)
    custody = Custody(brief, directory, held)
    control = listening(directory / "control", os.geteuid())
    hook = listening(directory / hook_server.SOCKET, os.geteuid())
    keeper = listening(directory / "keeper", brief.uid)

    async def serve(deposit: Deposit) -> None:
        custody.take_up(deposit)
        await _until_end(
            custody,
            custody.listen(control, os.geteuid(), custody.answer_control),
            custody.listen(keeper, brief.uid, custody.answer_destination),
            hook_server.listen(hook, custody.answer_hook),
        )
        # Nobody who waits for our end may find anything behind it.
        remove(brief.name, directory)

    def work(deposit: Deposit) -> int:
        rename("sevhop-keeper")
        asyncio.run(serve(deposit))
        return 0

    print(f"ready {directory}", flush=True)
    _detach()
    Guardian(work).run()


async def _until_end(custody: Custody, *listening: Coroutine[Any, Any, None]) -> None:
    """Serve until the keeper is not needed any more. Whoever cannot listen dies, and its successor may do better."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, custody.terminate)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    tasks = {asyncio.ensure_future(work) for work in (custody.end.wait(), *listening)}
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()


def _detach() -> None:
    """Nothing of the command's is held any more: it waits for our output to end."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    os.close(null)


def main() -> int:
    """The process, which becomes the guardian."""
    protect()
    rename("sevhop-guardian")
    logging.basicConfig(level=logging.CRITICAL)
    try:
        brief = Brief.from_json(sys.stdin.read())
        directory = claim(brief.name, brief.uuid)
        try:
            _keep(brief, directory)
        finally:
            remove(brief.name, directory)
    except SevhopError as err:
        print(err, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
