"""
The keeper as a process of its own: it carries a guest from a QEMU that has ended to one that libvirt starts.

libvirt cannot have two domains of one UUID, so for a moment there is no QEMU at all. What is left of the guest then is
here (its memory, its VM, the RAM blocks that were private to the source) and in a save image (its device state). The
keeper has a session of its own and outlives the command that started it. ::

    held ──> retiring ──> waiting ──restore begin──> restoring ──started begin──> committed ──the guest runs──> over
                             ^                          │                            │
                             └──────────────────────────┴──── the destination died ──┘

In its directory, which it makes and removes, are two sockets, both SOCK_SEQPACKET, and peers are told by SO_PEERCRED:

``control``   root's: the command that has started it, and the hook
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
import enum
import errno
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Self

from sevhop_qmp import adopt, move, ram_blocks
from sevhop_qmp.errors import MonitorError, MoveError, SevhopError
from sevhop_qmp.monitor import COMMAND_TIMEOUT, Monitor, peer_credentials
from sevhop_qmp.process import QemuProcess
from sevhop_qmp.ram_blocks import KeptBlock, RamBlock

from .guest import SevContext
from .keeper import Answers, Held

log = logging.getLogger(__name__)

#: What every hop under way has a directory in; root's, others may only pass through.
RUN = Path("/run/sevhop")
#: One link for each hop under way, named like the domain; the hook looks here.
DOMAINS = RUN / "domains"
#: Seconds in which a new keeper must have taken everything.
START_TIMEOUT = 60.0
#: Seconds in which it must answer. A commit may retry for seconds.
ANSWER_TIMEOUT = 30.0
#: Seconds in which a source that was told to end has ended, if the command that told it has gone.
RETIRE_TIMEOUT = 10.0
#: Seconds in which a destination's machine is complete, counted from when its monitor exists.
_MACHINE_TIMEOUT = 60.0
#: Seconds between two looks for that monitor.
_MONITOR_POLL = 0.005
_MESSAGE = 4096


class KeeperError(SevhopError):
    """The keeper refused, or is not there any more."""


class State(enum.Enum):
    """How far the guest has come."""

    HELD = "held"
    RETIRING = "retiring"
    WAITING = "waiting"
    RESTORING = "restoring"
    COMMITTED = "committed"
    OVER = "over"


@dataclass(frozen=True)
class Brief:
    """
    What a new keeper must know.

    :ivar name, uuid: of the domain.
    :ivar pid: of the source.
    :ivar uid, gid: that QEMU runs as.
    :ivar emulator: for the destination.
    :ivar blocks: the source's RAM blocks.
    :ivar encrypted: names of those whose content cannot be carried.
    :ivar move_deadline: seconds for which a busy migration is tried again.
    :ivar step_timeout: seconds in which the destination must answer.
    """

    name: str
    uuid: str
    pid: int
    uid: int
    gid: int
    emulator: str
    context: SevContext
    blocks: tuple[RamBlock, ...]
    encrypted: tuple[str, ...]
    move_deadline: float = 2.0
    step_timeout: float = COMMAND_TIMEOUT

    def as_json(self) -> str:
        """For the keeper's standard input."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Back again."""
        fields = json.loads(text)
        fields["context"] = SevContext(**fields["context"])
        rows = [row | {"inode": row["inode"] and tuple(row["inode"])} for row in fields["blocks"]]
        fields["blocks"] = tuple(RamBlock(**row) for row in rows)
        fields["encrypted"] = tuple(fields["encrypted"])
        return cls(**fields)


# -- the command's side ----------------------------------------------------------------------------


class KeeperProcess:
    """
    A keeper that was started, and the connection to it.

    :ivar directory: its own; the save image goes there, too.
    """

    def __init__(self, directory: Path, control: socket.socket) -> None:
        self.directory = directory
        self._control = control

    @classmethod
    async def start(cls, brief: Brief) -> Self:
        """
        Start a keeper and have it take everything.

        :raises KeeperError: it could not, or there is one for this domain already.
        """
        # Not asyncio's subprocess: that one kills its child when the loop is closed, and this child is to outlive us.
        process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            with process.stdin, process.stdout:
                process.stdin.write(brief.as_json().encode())
                process.stdin.close()
                words = await asyncio.wait_for(asyncio.to_thread(_first_line, process.stdout), START_TIMEOUT)
        except (TimeoutError, OSError) as err:
            process.kill()
            process.wait()
            if (left := hop_of(brief.name)) is not None and not _alive(left):
                remove(brief.name, left)
            raise KeeperError("the keeper did not start") from err
        if not words.startswith("ready "):
            raise KeeperError(words or "the keeper did not start")
        self = await cls.connect(Path(words.removeprefix("ready ")))
        await self.status()
        return self

    @classmethod
    async def connect(cls, directory: Path) -> Self:
        """:raises KeeperError: nobody answers there."""
        control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        control.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(control, str(directory / "control"))
        except OSError as err:
            control.close()
            raise KeeperError(f"the keeper in {directory} is gone") from err
        return cls(directory, control)

    def close(self) -> None:
        """Hang up. The keeper goes on for as long as the guest needs it."""
        self._control.close()

    @property
    def image(self) -> Path:
        """Where the save image goes."""
        return self.directory / "image"

    @property
    def socket(self) -> Path:
        """What adopt.so is told."""
        return self.directory / "keeper"

    @property
    def monitor(self) -> Path:
        """Where the destination opens a monitor for the keeper."""
        return self.directory / "monitor" / "qmp"

    async def keep_blocks(self) -> None:
        """The source has stopped: copy those RAM blocks that are private to it."""
        await self._ask("blocks")

    async def retire(self) -> None:
        """The image is complete and the source will be ended."""
        await self._ask("retire")

    async def source_ended(self) -> None:
        """The source is gone: from now on the domain may be restored."""
        await self._ask("ended")

    async def use(self, emulator: str) -> None:
        """The next restore is to use this emulator."""
        await self._ask(f"emulator {emulator}")

    async def status(self) -> dict[str, Any]:
        """How far it has come."""
        answer: dict[str, Any] = json.loads(await self._ask("status"))
        return answer

    async def release(self) -> None:
        """Let go of everything and end. A guest that does not run anywhere is lost then."""
        with contextlib.suppress(KeeperError):
            await self._ask("release")
            await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self._control, 1), ANSWER_TIMEOUT)

    async def _ask(self, request: str) -> str:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                await loop.sock_sendall(self._control, request.encode())
                answer = (await loop.sock_recv(self._control, _MESSAGE)).decode()
        except TimeoutError as err:
            raise KeeperError(f"the keeper did not answer within {ANSWER_TIMEOUT:g} s") from err
        except OSError as err:
            raise KeeperError("the keeper is gone") from err
        verdict, _, rest = answer.partition(" ")
        if verdict != "ok":
            raise KeeperError(rest or "the keeper is gone")
        return rest


def _first_line(file: IO[bytes]) -> str:
    return file.readline().decode().strip()


def hop_of(name: str) -> Path | None:
    """The directory of the keeper of a domain, None when it is in no hop. The keeper may be dead."""
    try:
        return DOMAINS / os.readlink(DOMAINS / name)
    except OSError:
        return None


def hops_under_way() -> list[str]:
    """Names of the domains that are in a hop, or whose keeper has died."""
    try:
        return sorted(name for name in os.listdir(DOMAINS) if hop_of(name))
    except FileNotFoundError:
        return []


# -- the keeper's side -----------------------------------------------------------------------------


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
            while request := await loop.sock_recv(sock, _MESSAGE):
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
            return f"no {err}"[:_MESSAGE], None
        except Exception as err:
            log.exception("%r", request)
            return f"no unexpected {type(err).__name__}: {err}"[:_MESSAGE], None
        return "no this is not a request", None

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


def make_run_directories() -> None:
    """Make those directories that all hops share. QEMU's user may pass through the outer one, but not list it."""
    RUN.mkdir(mode=0o711, exist_ok=True)
    RUN.chmod(0o711)
    DOMAINS.mkdir(mode=0o700, exist_ok=True)


def claim(name: str) -> Path:
    """
    Make the directory of a keeper, and the link by which the hook finds it. What a dead keeper has left is removed.

    :raises KeeperError: a hop of this domain is under way.
    """
    make_run_directories()
    left = hop_of(name)
    if left is not None:
        if _alive(left):
            raise KeeperError(f"a hop of domain {name} is under way", "see sevhop status")
        remove(name, left)
    # The name cannot be guessed, and the directory above cannot be listed by others.
    directory = RUN / secrets.token_hex(16)
    directory.mkdir(mode=0o711)
    try:
        os.symlink(f"../{directory.name}", DOMAINS / name)
    except OSError as err:
        directory.rmdir()
        raise KeeperError(f"a hop of domain {name} is under way", "see sevhop status") from err
    return directory


def _alive(directory: Path) -> bool:
    """Whether a keeper serves this directory."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        try:
            sock.connect(str(directory / "control"))
        except OSError:
            return False
    return True


def remove(name: str, directory: Path) -> None:
    """Remove what :func:`claim` made."""
    with contextlib.suppress(OSError):
        if (DOMAINS / name).resolve() == directory.resolve():
            (DOMAINS / name).unlink()
    shutil.rmtree(directory, ignore_errors=True)


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
