"""
The keeper as a process of its own: it carries a guest from a QEMU that has ended to one that libvirt starts.

libvirt cannot have two domains of one UUID, so for a moment there is no QEMU at all. What is left of the guest then is
here (its memory, its VM, the RAM blocks that were private to the source) and in a save image (its device state). The
keeper has a session of its own and outlives the command that started it. ::

    held ──> retiring ──> waiting ──restore begin──> restoring ──started begin──> committed ──the guest runs──> over
                             ^                          │                            │
                             └──────────────────────────┴──── the destination died ──┘

In its directory, which it makes and removes, are three sockets, all SOCK_SEQPACKET, and peers are told by SO_PEERCRED:

``control``   root's: the command that has started it, and the hook where that is a program of its own
``hook``      root's: the hook; see :mod:`sevhop.hook_calls`
``keeper``    QEMU's user's: adopt.so in the destination; see :mod:`sevhop.keeper`

The commit happens here, asked for by the hook at ``started begin``: the kept RAM blocks are written into the
destination and the SEV context is moved. The keeper holds the destination's VM from then on, so that the guest is safe
should that QEMU be killed before it runs.

It ends when it is told to; when the guest runs and no command is connected any more; and when the command goes away
while the source still has everything.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import signal
import socket
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sevhop_qmp import adopt, move, ram_blocks
from sevhop_qmp.errors import MonitorError, MoveError, SevhopError
from sevhop_qmp.monitor import Monitor, peer_credentials
from sevhop_qmp.process import QemuProcess
from sevhop_qmp.ram_blocks import KeptBlock, RamBlock

from . import hook_calls
from .keeper import Answers, Held
from .keeper_process import MESSAGE, START_TIMEOUT, Brief, KeeperError, State
from .run_directory import claim, remove

log = logging.getLogger(__name__)

#: Seconds in which a source that was told to end has ended, if the command that told it has gone.
RETIRE_TIMEOUT = 10.0
#: Seconds in which a destination's machine is complete, counted from when its monitor exists.
_MACHINE_TIMEOUT = 60.0
#: Seconds between two looks for that monitor.
_MONITOR_POLL = 0.005


@dataclass(frozen=True)
class _Met:
    """A destination whose machine is complete."""

    monitor: Monitor
    process: QemuProcess
    blocks: dict[str, RamBlock]


class Custody:
    """
    What the keeper holds and what it does with it.

    :ivar reason: why the last restore did not come to its end.
    """

    def __init__(self, brief: Brief, directory: Path, held: Held) -> None:
        self._brief = brief
        self._directory = directory
        self._held = held
        self._emulator = brief.emulator
        self._source = QemuProcess.open(brief.pid)
        self._kept: dict[str, KeptBlock] = {}
        self._move: move.MoveReport | None = None
        self._perhaps_moved_to: int | None = None
        self._commit_ms = 0.0
        self._restore_began = 0.0
        self._until_started_ms = 0.0
        self._destination: QemuProcess | None = None
        self._version = ""
        self._commands: set[socket.socket] = set()
        self._meeting: asyncio.Task[_Met] | None = None
        self._committing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self.state = State.HELD
        self.reason = ""
        self.end = asyncio.Event()

    # Whoever connects is served by a task of its own.

    async def listen(self, path: Path, uid: int, serve: Any) -> None:
        """Serve all who connect to a socket and run as a user, or as root."""
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as listener:
            listener.bind(str(path))
            os.chmod(path, 0o600)
            os.chown(path, uid, -1)
            listener.listen(8)
            while True:
                sock, _ = await loop.sock_accept(listener)
                if peer_credentials(sock)[1] not in (0, os.geteuid(), uid):
                    sock.close()
                    continue
                task = asyncio.ensure_future(self._until_hangup(sock, serve))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _until_hangup(self, sock: socket.socket, serve: Any) -> None:
        loop = asyncio.get_running_loop()
        with sock, contextlib.suppress(OSError):
            sock.setblocking(False)
            while request := await loop.sock_recv(sock, MESSAGE):
                text, fd = await serve(sock, request)
                log.info("%r -> %s", request, text)
                socket.send_fds(sock, [text.encode()], [] if fd is None else [fd])
                if request == b"release":
                    self.end.set()
        if sock in self._commands:
            self._commands.discard(sock)
            if not self._commands:
                await self._left_alone()

    def expect_command(self) -> None:
        """End unless there has been a command."""
        if self.state is State.HELD and not self._commands:
            self.end.set()

    async def _left_alone(self) -> None:
        """The command is gone. Whether we are needed without it depends on who has the guest."""
        if self.state is State.RETIRING and await self._source.wait(RETIRE_TIMEOUT):
            self.state = State.WAITING
        if self.state in (State.HELD, State.RETIRING, State.OVER):
            self.end.set()

    # -- adopt.so ----------------------------------------------------------------------------------

    async def answer_destination(self, sock: socket.socket, request: bytes) -> tuple[str, int | None]:
        """Only while libvirt restores the domain, with our hook, is there a destination."""
        if self.state is not State.RESTORING:
            return "no the hook of sevhop did not announce this QEMU", None
        return Answers(self._held, self._brief.context, source_ended=True).answer(request)

    # -- the command and the hook ------------------------------------------------------------------

    async def answer_control(self, sock: socket.socket, request: bytes) -> tuple[str, int | None]:
        """One word and its arguments; never raises."""
        try:
            match request.decode().split(" "):
                case ["hook", operation, sub, uuid]:
                    return await self._hook(operation, sub, uuid), None
                case [word, *arguments]:
                    self._commands.add(sock)
                    return await self._command(word, " ".join(arguments)), None
        except SevhopError as err:
            return f"no {err}"[:MESSAGE], None
        except Exception as err:
            log.exception("%r", request)
            return f"no unexpected {type(err).__name__}: {err}"[:MESSAGE], None
        return "no this is not a request", None

    async def answer_hook(self, sock: socket.socket, request: str) -> str:
        """The same for a hook whose call was handed over."""
        return (await self.answer_control(sock, request.encode()))[0]

    async def _command(self, word: str, argument: str) -> str:
        match word:
            case "status":
                return f"ok {json.dumps(self._status())}"
            case "blocks" if self.state is State.HELD:
                wanted = [block for block in self._brief.blocks if block.name not in self._brief.encrypted]
                self._kept = ram_blocks.keep(self._source, wanted)
                return "ok"
            case "retire" if self.state is State.HELD:
                self.state = State.RETIRING
                return "ok"
            case "ended" if self.state is State.RETIRING:
                if self._source.alive:
                    return "no the source is still there"
                self.state = State.WAITING
                return "ok"
            case "emulator" if argument:
                self._emulator = argument
                return "ok"
            case "release":
                return "ok"
        return f"no {word} is not possible while the guest is {self.state.value}"

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

    async def _hook(self, operation: str, sub: str, uuid: str) -> str:
        if uuid.lower() != self._brief.uuid.lower():
            return "foreign"
        match operation, sub:
            case "restore", "begin":
                if self._committing.locked() or (self._destination is not None and self._destination.alive):
                    return "no the guest is being restored already"
                if self.state in (State.HELD, State.RETIRING):
                    return "no the guest has not been saved yet"
                if self.state is State.OVER:
                    return "no the guest runs"
                self.state = State.RESTORING
                self.reason = ""
                self._restore_began = time.monotonic()
                self._expect_destination()
                return f"ok {self._emulator}"
            case "prepare" | "migrate", "begin" if self.state in (State.HELD, State.RETIRING, State.WAITING):
                return f"no the guest is held; go on with: virsh restore {self._directory / 'image'}"
            case "started", "begin" if self.state is not State.OVER:
                return await self._started()
        return "ok"

    # -- commit ------------------------------------------------------------------------------------

    async def _started(self) -> str:
        """Commit, if that is due. :return: ``ok`` if and only if the guest may run."""
        if self.state is not State.RESTORING or self._committing.locked():
            return f"no the guest is {self.state.value}, there is nothing to start"
        async with self._committing:
            began = time.monotonic()
            self._until_started_ms = (began - self._restore_began) * 1e3
            try:
                assert self._meeting is not None
                met = await asyncio.wait_for(self._meeting, self._brief.step_timeout)
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
            self.state = State.COMMITTED
            task = asyncio.ensure_future(self._until_it_runs(met.monitor))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return "ok"

    def _expect_destination(self) -> None:
        """Get to know the destination while libvirt still sets it up: that takes time, too."""
        if self._meeting is not None:
            self._meeting.cancel()
        path = self._directory / "monitor" / "qmp"
        path.unlink(missing_ok=True)  # of one that has died
        self._meeting = asyncio.ensure_future(self._meet(path))
        # A destination that never comes up is libvirt's to tell of.
        self._meeting.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _meet(self, path: Path) -> _Met:
        while not path.exists():
            await asyncio.sleep(_MONITOR_POLL)
        # It answers when its machine is complete.
        monitor = await Monitor.connect(path, timeout=self._brief.step_timeout, greeting_timeout=_MACHINE_TIMEOUT)
        destination = QemuProcess.open(monitor.peer)
        return _Met(monitor, destination, await ram_blocks.read(monitor, destination))

    async def _commit(self, met: _Met) -> None:
        monitor, destination = met.monitor, met.process
        self._version = monitor.version
        status = await adopt.adopt_status(monitor)
        if status.source != "ended" or status.ram != "shared":
            raise KeeperError(f"the destination has not adopted the guest's memory (it is {status.ram})")
        if (await monitor.execute("query-status"))["running"]:
            raise KeeperError("the destination runs already")
        source = {block.name: block for block in self._brief.blocks}
        pairs = ram_blocks.not_shared(source, met.blocks, encrypted=frozenset(self._brief.encrypted))
        ram_blocks.put(((self._kept[theirs.name], ours) for theirs, ours in pairs), destination)
        if self._brief.context.kind != "none":
            await self._move_context(monitor, destination)
        await adopt.finish(monitor)
        self._destination = destination

    async def _move_context(self, monitor: Monitor, destination: QemuProcess) -> None:
        """Move, and hold the VM in which the context is then."""
        number = destination.vm_descriptor()
        if number is None or self._held.vm is None:
            raise KeeperError("there is no KVM VM to move the context to, or from")
        vm = destination.duplicate(number)
        try:
            self._move = await self._move_from(self._held.vm, monitor, destination)
        except MonitorError:
            # The destination died in the middle. Whether the context was moved is for the next attempt to find out.
            self._perhaps_moved_to, vm = vm, -1
            raise
        finally:
            if vm >= 0:
                if self._move is not None and not self._move.errno:
                    os.dup2(vm, self._held.vm, inheritable=False)
                os.close(vm)
        if self._move.restore_errno:
            reason = os.strerror(self._move.restore_errno)
            raise KeeperError(f"the context was moved, but vCPU registers could not be set: {reason}")
        # The firmware was encrypted in place at launch, in pages of the source: a reset would execute what is no code.
        await monitor.execute("set-action", {"reboot": "shutdown"})

    async def _move_from(self, vm: int, monitor: Monitor, destination: QemuProcess) -> move.MoveReport:
        deadline = self._brief.move_deadline
        try:
            return await move.move(monitor, destination.pid, vm, deadline=deadline)
        except MoveError as err:
            if err.errno != errno.EIO or self._perhaps_moved_to is None:
                raise
        # That VM is dead: the earlier attempt had moved the context before it died.
        return await move.move(monitor, destination.pid, self._perhaps_moved_to, deadline=deadline)

    async def _until_it_runs(self, monitor: Monitor) -> None:
        """Behind the commit, until the guest runs or its QEMU has ended."""
        async with monitor:
            with monitor.events("RESUME") as events:
                try:
                    while not (await monitor.execute("query-status"))["running"]:
                        await monitor.next_event(events, timeout=float("inf"))
                except SevhopError as err:
                    log.info("the destination is gone: %s", err)
                    self.reason = "the destination ended before the guest ran"
                    self.state = State.WAITING
                    self._destination = None
                    return
        self.state = State.OVER
        if not self._commands:
            self.end.set()


async def _keep(brief: Brief) -> None:
    directory = claim(brief.name)
    try:
        process = QemuProcess.open(brief.pid)
        held = Held.take_machine(process, brief.blocks)
        process.close()
        monitor = directory / "monitor"
        monitor.mkdir(mode=0o700)
        os.chown(monitor, brief.uid, brief.gid)
        custody = Custody(brief, directory, held)
        listening = [
            asyncio.ensure_future(custody.listen(directory / "control", os.geteuid(), custody.answer_control)),
            asyncio.ensure_future(custody.listen(directory / "keeper", brief.uid, custody.answer_destination)),
            asyncio.ensure_future(hook_calls.listen(directory / hook_calls.SOCKET, custody.answer_hook)),
        ]
        # The first run of each makes its socket.
        await asyncio.sleep(0)
        for task in listening:
            if task.done():
                task.result()
        print(f"ready {directory}", flush=True)
        _detach()
        # A command that was killed at this very moment will not come.
        asyncio.get_running_loop().call_later(START_TIMEOUT, custody.expect_command)
        await custody.end.wait()
        for task in listening:
            task.cancel()
        held.close()
    finally:
        remove(brief.name, directory)


def _detach() -> None:
    """Nothing of the command's is held any more: it waits for our output to end."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    os.close(null)


def main() -> int:
    """The process."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.CRITICAL)
    try:
        asyncio.run(_keep(Brief.from_json(sys.stdin.read())))
    except SevhopError as err:
        print(err, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
