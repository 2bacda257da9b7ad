"""The keeper's replies to libvirt's hook and to the command, and what its successor restores."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import json
import mmap
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Coroutine, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sevhop.keeper import destination as keeper_destination
from sevhop.keeper.config import KeeperConfig
from sevhop.keeper.fdstore import FdStore
from sevhop.keeper.handover import SourceHandles
from sevhop.keeper.paths import KeeperPaths
from sevhop.keeper.server import KeeperServer
from sevhop.keeper.state import RAN, State
from sevhop.libvirt import hook_server
from sevhop.records.run_directory import listening
from sevhop_qmp import monitor
from sevhop_qmp.errors import MonitorError, MoveError, MoveUncertain, SevhopError
from sevhop_qmp.move import MoveReport
from sevhop_qmp.peer import peer_credentials
from sevhop_qmp.process import QemuProcess
from sevhop_qmp.ram_blocks import RamBlock
from sevhop_qmp.run_mark import RunState

from .keeper_config import BLOCKS, UUID, config
from .marks import redirect_marks


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


async def ask(server: KeeperServer, request: str) -> str:
    with socket.socket() as sock:
        answer, fd = await server.answer_control(sock, request.encode())
    assert fd is None
    return answer


@pytest.fixture
def server(tmp_path: Path) -> KeeperServer:
    (tmp_path / "monitor").mkdir()
    return KeeperServer(config(), KeeperPaths(tmp_path), SourceHandles(None, {}))


def test_config_survives_json() -> None:
    assert KeeperConfig.from_json(config().as_json()) == config()


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("step", ["started begin", "reconnect begin", "stopped end", "gibberish -"])
@pytest.mark.parametrize("uuid", ["22222222-2222-3333-4444-555555555501", "-"])
def test_foreign_domain_is_ignored(server: KeeperServer, state: State, step: str, uuid: str) -> None:
    server.record.state = state
    assert run(ask(server, f"hook {step} {uuid}")) == "foreign"
    assert server.record.state is state


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("step", ["restore begin", "prepare begin", "prepare cold-start", "migrate begin"])
@pytest.mark.parametrize("uuid", ["22222222-2222-3333-4444-555555555501", "-"])
def test_reserved_name_is_not_started_by_another_domain(
    server: KeeperServer, state: State, step: str, uuid: str
) -> None:
    server.record.state = state
    answer = run(ask(server, f"hook {step} {uuid}"))
    assert (
        answer == "foreign"
        if state is State.OVER
        else f"has reserved its name for the domain with UUID {UUID}" in answer
    )
    assert server.record.state is state


RESTORABLE = {State.WAITING, State.RESTORING, State.COMMITTED}


@pytest.mark.parametrize("state", State)
def test_restore_needs_a_suspended_guest(server: KeeperServer, state: State) -> None:
    server.record.state = state
    answer = run(ask(server, f"hook restore begin {UUID.upper()}"))
    assert answer == "ok /opt/qemu" if state in RESTORABLE else answer.startswith("error ")
    assert server.record.state is (State.RESTORING if state in RESTORABLE else state)


@pytest.mark.parametrize("state", State)
def test_domain_of_a_suspended_guest_is_not_started_cold(server: KeeperServer, state: State) -> None:
    server.record.state = state
    answer = run(ask(server, f"hook prepare cold-start {UUID}"))
    assert answer.startswith("error ") == (state not in (State.OVER, State.LOST))


@pytest.mark.parametrize("state", State)
def test_restored_domain_is_prepared_after_the_restore_began(server: KeeperServer, state: State) -> None:
    server.record.state = state
    answer = run(ask(server, f"hook prepare begin {UUID}"))
    assert answer.startswith("error ") == (state in {State.HELD, State.RETIRING, State.WAITING})


@pytest.mark.parametrize("state", set(State) - {State.RESTORING})
def test_commit_is_refused_without_a_restore(server: KeeperServer, state: State) -> None:
    server.record.state = state
    answer = run(ask(server, f"hook started begin {UUID}"))
    refused = f'error cannot start the guest: the keeper is in state "{state.value}"; see: sevhop status'
    assert answer == ("ok" if state in (State.OVER, State.LOST) else refused)


@pytest.mark.parametrize("state", set(State) - {State.RESTORING})
def test_destination_is_refused_without_a_restore(server: KeeperServer, state: State) -> None:
    server.record.state = state
    with socket.socket() as sock:
        answer, fd = run(server.answer_destination(sock, b"hello 1"))
    assert answer.startswith("error ")
    assert fd is None


def test_restore_is_refused_while_one_is_in_progress(server: KeeperServer) -> None:
    """This test is the destination, and its parent restores the domain."""

    async def work() -> None:
        ours, tsuccessors = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, tsuccessors:
            await server.answer_control(ours, f"hook restore begin {UUID}".encode())
            await server.answer_destination(ours, b"hello 1")
            answer, _ = await server.answer_control(ours, f"hook restore begin {UUID}".encode())
            assert "it is being restored already" in answer

    server.record.state = State.WAITING
    run(work())


@pytest.mark.parametrize("state", State)
def test_guest_is_not_released_while_its_source_is_being_killed(server: KeeperServer, state: State) -> None:
    """Nobody knows then which of the two has it."""
    server.record.state = state
    answer = run(ask(server, "release"))
    assert answer.startswith("error ") == (state is State.RETIRING)
    assert server.record.released == (state is not State.RETIRING)


def test_destination_is_notified_that_the_source_has_exited(server: KeeperServer) -> None:
    server.record.state = State.RESTORING
    with socket.socket() as sock:
        answer, _ = run(server.answer_destination(sock, b"hello 1"))
    assert answer.startswith("ok context=sev source=ended handle=7 measurement=abab")


#: A source that has locked its image, as QEMU does, and unlocks and locks it on request.
SOURCE = """
import fcntl, os, struct, sys
image = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
for kind in (fcntl.F_RDLCK, fcntl.F_UNLCK, fcntl.F_RDLCK):
    fcntl.fcntl(image, fcntl.F_OFD_SETLK, struct.pack("@hhqqi4x", kind, 0, 100, 8, 0))
    print(flush=True)
    sys.stdin.readline()
"""


class Source:
    """Such a process."""

    def __init__(self, image: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SOURCE, image], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._wait()

    def _wait(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline()

    def proceed(self) -> None:
        """Unlock the image, or the second time lock it again."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        self._wait()


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Source]:
    """It runs and has its image."""
    source = Source(tmp_path / "disk")
    with source.process:
        yield source
        source.process.kill()


def test_source_is_terminated_once_it_has_given_up_its_images(tmp_path: Path, source: Source) -> None:
    server = KeeperServer(replace(config(), pid=source.process.pid), KeeperPaths(tmp_path), SourceHandles(None, {}))
    source.proceed()
    assert run(ask(server, "retire")) == "ok"
    assert server.record.state is State.WAITING
    assert source.process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("resumed", ["before it gave up its images", "after that"])
def test_source_that_was_resumed_keeps_running(tmp_path: Path, source: Source, resumed: str) -> None:
    server = KeeperServer(replace(config(), pid=source.process.pid), KeeperPaths(tmp_path), SourceHandles(None, {}))
    if resumed == "after that":
        source.proceed()
        source.proceed()
    assert run(ask(server, "retire")) == "error another client has resumed the guest"
    assert server.record.state is State.HELD
    if resumed != "after that":
        source.proceed()


def test_source_that_exited_unexpectedly_is_not_needed(tmp_path: Path, source: Source) -> None:
    server = KeeperServer(replace(config(), pid=source.process.pid), KeeperPaths(tmp_path), SourceHandles(None, {}))
    source.process.kill()
    source.process.wait()
    assert run(ask(server, "retire")) == "ok"
    assert server.record.state is State.WAITING


# -- whether the guest has run ---------------------------------------------------------------------


@pytest.fixture
def destination() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing, and answers nothing."""
    with subprocess.Popen(["sleep", "infinity"]) as process:
        yield process
        process.send_signal(signal.SIGCONT)
        process.kill()


def leave_mark(server: KeeperServer, state: RunState) -> None:
    """As the library in a destination does."""
    os.pwrite(server._run_mark.fileno(), bytes([state]), 0)


def committed(server: KeeperServer, destination: subprocess.Popen[bytes]) -> None:
    """The destination may run the guest, and the keeper does not know yet whether it does."""
    server.record.state = State.COMMITTED
    server._destination = QemuProcess.open(destination.pid)


@pytest.mark.parametrize("state", [State.WAITING, State.RESTORING, State.COMMITTED])
def test_guest_that_has_run_is_not_restored_again(server: KeeperServer, state: State) -> None:
    server.record.state = state
    leave_mark(server, RunState.RAN)
    assert run(ask(server, f"hook restore begin {UUID}")).startswith(f"error cannot restore the guest: {RAN}")
    assert run(ask(server, f"hook started begin {UUID}")).startswith(f"error cannot start the guest: {RAN}")
    assert server.record.state is state


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("keeper", ["lives", "died before"])
def test_guest_is_lost_with_the_destination_only_if_it_has_run(
    ran: bool, keeper: str, server: KeeperServer, tmp_path: Path, destination: subprocess.Popen[bytes]
) -> None:
    """Proof that the guest has not run is needed to restore it again."""

    async def work() -> KeeperServer:
        shelf = Shelf()
        server.restore(shelf)
        committed(server, destination)
        server._enter(State.COMMITTED)
        leave_mark(server, RunState.RAN if ran else RunState.NOT)
        destination.kill()
        destination.wait()
        successor = server
        if keeper != "lives":
            successor = KeeperServer(config(), KeeperPaths(tmp_path), SourceHandles(None, {}))
            successor._run_mark = server._run_mark  # inherited from the supervisor
            successor.restore(shelf)
        await successor._until_it_runs(successor._destination or pytest.fail("it has no destination"), None)
        return successor

    successor = run(work())
    assert successor.record.state is (State.LOST if ran else State.WAITING)
    assert successor.record.reason


def test_keeper_is_over_once_the_guest_has_run_in_a_stuck_qemu(
    server: KeeperServer, destination: subprocess.Popen[bytes]
) -> None:
    async def work() -> None:
        committed(server, destination)
        leave_mark(server, RunState.RAN)
        destination.send_signal(signal.SIGSTOP)
        await server._until_it_runs(server._destination or pytest.fail("it has no destination"), None)

    run(work())
    assert server.record.state is State.OVER


@pytest.mark.parametrize("ran", [False, True])
def test_revoke_kills_only_a_destination_that_has_not_run(
    ran: bool, server: KeeperServer, destination: subprocess.Popen[bytes]
) -> None:
    committed(server, destination)
    leave_mark(server, RunState.RAN if ran else RunState.NOT)
    answer = run(ask(server, "revoke"))
    if ran:
        assert (answer, server.record.state) == ("error the guest has run in a new QEMU already", State.COMMITTED)
        assert destination.poll() is None
    else:
        assert (answer, server.record.state) == ("ok", State.WAITING)
        assert destination.wait() == -signal.SIGKILL


def test_revoke_kills_a_destination_that_is_starting(
    server: KeeperServer, destination: subprocess.Popen[bytes]
) -> None:
    """It may hang, and would keep libvirt waiting."""
    server.record.state = State.WAITING
    assert run(ask(server, f"hook restore begin {UUID}")) == "ok /opt/qemu"
    server._restore.started(destination.pid)
    assert (run(ask(server, "revoke")), server.record.state) == ("ok", State.WAITING)
    assert destination.wait(10) == -signal.SIGKILL


def test_revoked_restore_is_not_committed(server: KeeperServer) -> None:
    server.record.state = State.WAITING
    assert run(ask(server, f"hook restore begin {UUID}")) == "ok /opt/qemu"
    assert run(ask(server, "revoke")) == "ok"
    assert run(ask(server, f"hook started begin {UUID}")).startswith("error ")
    assert run(ask(server, f"hook restore begin {UUID}")) == "again /opt/qemu"


@pytest.mark.parametrize("request_text", ["", " ", "emulator", "emulator ", "hook", "hook a b", "nonsense", "blocks x"])
def test_invalid_request_changes_nothing(server: KeeperServer, request_text: str) -> None:
    server.record.state = State.WAITING
    assert run(ask(server, request_text)).startswith("error ")
    assert server.record.state is State.WAITING


def test_emulator_of_the_next_restore_can_be_replaced(server: KeeperServer) -> None:
    server.record.state = State.WAITING
    assert run(ask(server, "emulator /old qemu")) == "ok"
    assert run(ask(server, f"hook restore begin {UUID}")) == "ok /old qemu"


def test_second_restore_is_reported_as_one(server: KeeperServer, tmp_path: Path) -> None:
    server.record.state = State.WAITING
    assert run(ask(server, f"hook restore begin {UUID}")) == "ok /opt/qemu"
    server.record.state = State.WAITING
    assert run(ask(server, f"hook restore begin {UUID}")) == "again /opt/qemu"


# -- successors ------------------------------------------------------------------------------------


class Shelf(FdStore):
    """A store that keeps the last checkpoint for a successor in the same process."""

    def __init__(self) -> None:
        super().__init__({}, {})
        self.needed = False

    def store(self, record: Mapping[str, Any], descriptors: Mapping[str, int], *, needed: bool) -> None:
        # As it is sent to a supervisor.
        self.record, self.needed = json.loads(json.dumps(record)), needed
        self.descriptors = {name: os.dup(fd) for name, fd in descriptors.items()}


async def succession(server: KeeperServer, state: State, tmp_path: Path) -> KeeperServer:
    """A keeper that dies in a state, and the next one."""
    shelf = Shelf()
    server.restore(shelf)
    server._enter(state)
    successor = KeeperServer(config(), KeeperPaths(tmp_path), SourceHandles(None, {}))
    successor.restore(shelf)
    return successor


@pytest.mark.parametrize("state", set(State) - {State.RETIRING})
def test_successor_continues_in_the_same_state(server: KeeperServer, tmp_path: Path, state: State) -> None:
    async def work() -> None:
        await ask(server, "emulator /other")
        successor = await succession(server, state, tmp_path)
        assert successor.record.state is state
        assert successor.status() == server.status()
        assert not successor.end.is_set()

    run(work())


def test_saved_blocks_outlive_the_keeper(server: KeeperServer, tmp_path: Path) -> None:
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 8 * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[page : page + 5] = b"first"
    memory[5 * page : 5 * page + 4] = b"last"
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    # The second begins where the first ends, and ends within a page.
    blocks = (
        BLOCKS[0],
        RamBlock("pc.rom", address, 4 * page, 4 * page, None, False),
        RamBlock("tables", address + 4 * page, page + 3, 4 * page, None, False),
        RamBlock("empty", address + 6 * page, page, page, None, False),
    )
    of_this_test = replace(config(), blocks=blocks)

    async def work() -> None:
        shelf = Shelf()
        server = KeeperServer(of_this_test, KeeperPaths(tmp_path), SourceHandles(None, {}))
        server.restore(shelf)
        assert await ask(server, "blocks") == "ok"
        assert await ask(server, "blocks") == "ok"
        successor = KeeperServer(of_this_test, KeeperPaths(tmp_path), SourceHandles(None, {}))
        successor.restore(shelf)
        assert successor._saved_blocks.copies == server._saved_blocks.copies
        assert successor._saved_blocks.copies["pc.rom"].parts == ((page, b"first".ljust(page, b"\0")),)
        assert successor._saved_blocks.copies["tables"].parts == ((page, b"las"),)
        assert successor._saved_blocks.copies["empty"].parts == ()

    run(work())


NEEDED = {State.RETIRING, State.WAITING, State.RESTORING, State.COMMITTED}


@pytest.mark.parametrize("state", State)
def test_sigterm_does_not_terminate_a_needed_keeper(server: KeeperServer, state: State) -> None:
    shelf = Shelf()

    async def work() -> None:
        server.restore(shelf)
        server._enter(state)
        server.terminate()

    run(work())
    assert shelf.needed == (state in NEEDED)
    assert server.end.is_set() == (state not in NEEDED)


def test_requests_may_be_repeated(tmp_path: Path, source: Source) -> None:
    server = KeeperServer(replace(config(), pid=source.process.pid), KeeperPaths(tmp_path), SourceHandles(None, {}))
    source.proceed()
    for state in (State.HELD, State.WAITING, State.RESTORING, State.COMMITTED, State.OVER):
        server.record.state = state
        assert run(ask(server, "retire")) == "ok"
        assert server.record.state is (State.WAITING if state is State.HELD else state)


@pytest.mark.parametrize("resumed", [False, True])
def test_successor_terminates_a_stopped_source(tmp_path: Path, source: Source, resumed: bool) -> None:
    of_source = replace(config(), pid=source.process.pid)
    server = KeeperServer(of_source, KeeperPaths(tmp_path), SourceHandles(None, {}))
    successor = KeeperServer(of_source, KeeperPaths(tmp_path), SourceHandles(None, {}))
    if not resumed:
        source.proceed()

    async def work() -> None:
        shelf = Shelf()
        server.restore(shelf)
        server._enter(State.RETIRING)
        source.process.send_signal(signal.SIGSTOP)
        successor.restore(shelf)
        assert (await ask(successor, "retire") == "ok") == (not resumed)

    run(work())
    assert successor.record.state is (State.HELD if resumed else State.WAITING)
    if resumed:
        source.proceed()


def test_keeper_that_dies_after_release_has_no_successor(server: KeeperServer, tmp_path: Path) -> None:
    async def work() -> KeeperServer:
        shelf = Shelf()
        server.restore(shelf)
        server._enter(State.WAITING)
        assert await ask(server, "release") == "ok"
        assert not shelf.needed
        successor = KeeperServer(config(), KeeperPaths(tmp_path), SourceHandles(None, {}))
        successor.restore(shelf)
        return successor

    assert run(work()).end.is_set()


def test_keeper_waits_for_its_command_to_reconnect(server: KeeperServer) -> None:
    """The command is this very test, and only another process sends requests."""

    async def work() -> None:
        server.restore(Shelf())
        ours, tsuccessors = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        serving = asyncio.ensure_future(server.clients._until_hangup(tsuccessors, answer_stranger))
        server.clients._commands.add(tsuccessors)
        ours.close()
        await serving
        assert not server.end.is_set()

    async def answer_stranger(sock: socket.socket, request: bytes) -> tuple[str, None]:
        return "ok", None

    run(work())


# -- peers -----------------------------------------------------------------------------------------

NOBODY = 65534
_PEER = """
import os, socket, sys
os.setuid(int(sys.argv[2]))
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
    sock.connect(sys.argv[1])
    for request in sys.argv[3:]:
        sock.send(request.encode())
        print(sock.recv(4096).decode())
"""


async def connect_as(uid: int, path: Path, *requests: str) -> list[str]:
    """The replies to a process of some user; none when the keeper hangs up."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _PEER, str(path), str(uid), *requests, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    out, _ = await process.communicate()
    return [line for line in out.decode().splitlines() if line]


async def served(server: KeeperServer, path: Path, uid: int, serve: Any, *peers: tuple[int, str]) -> list[list[str]]:
    """The replies to peers, one after the other, of a socket that anybody may open."""
    with listening(path, uid) as listener:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.stat().st_uid == uid
        path.chmod(0o666)
        task = asyncio.ensure_future(server.clients.listen(listener, uid, serve))
        answers = [await connect_as(peer, path, request) for peer, request in peers]
        task.cancel()
        await asyncio.wait({task})
        return answers


def test_control_socket_is_for_root_alone(server: KeeperServer, open_directory: Path) -> None:
    serve = server.answer_control
    answers = run(served(server, open_directory / "s", 0, serve, (NOBODY, "status"), (0, f"hook x y {UUID}")))
    assert answers == [[], ["ok"]]
    assert server.record.state is State.HELD


def test_hook_socket_is_for_root_alone(server: KeeperServer, open_directory: Path) -> None:
    heard: list[int] = []
    path = open_directory / "hook"

    def serve(sock: socket.socket, *_: object) -> None:
        with sock:
            heard.append(peer_credentials(sock)[1])

    async def work() -> None:
        with listening(path, 0) as listener:
            path.chmod(0o666)
            task = asyncio.ensure_future(hook_server.listen(listener, server.answer_hook))
            for uid in (NOBODY, 0):
                await connect_as(uid, path, "web")
            task.cancel()
            await asyncio.wait({task})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hook_server, "_serve", serve)
        run(work())
    assert heard == [0]


def test_memory_is_for_the_user_of_qemu_alone(server: KeeperServer, open_directory: Path) -> None:
    server.record.state = State.RESTORING
    serve = server.answer_destination
    answers = run(served(server, open_directory / "s", 1234, serve, (NOBODY, "hello 1"), (1234, "hello 1")))
    assert answers[0] == []
    assert answers[1][0].startswith("ok ")


def test_memory_is_for_one_destination_alone(server: KeeperServer, open_directory: Path) -> None:
    """The first to connect is the destination, until libvirt starts another one."""
    server.record.state = State.RESTORING
    serve = server.answer_destination
    path = open_directory / "s"
    answers = run(served(server, path, NOBODY, serve, (NOBODY, "hello 1"), (NOBODY, "hello 1")))
    assert answers[0][0].startswith("ok ")
    assert answers[1][0].startswith("error process ")
    path.unlink()

    async def again() -> list[list[str]]:
        await ask(server, f"hook restore begin {UUID}")
        return await served(server, path, NOBODY, serve, (NOBODY, "hello 1"))

    (open_directory / "monitor").mkdir()
    assert run(again())[0][0].startswith("ok ")


def test_keeper_is_not_released_by_the_destination(server: KeeperServer, open_directory: Path) -> None:
    server.record.state = State.RESTORING
    answers = run(served(server, open_directory / "s", NOBODY, server.answer_destination, (NOBODY, "release")))
    assert answers == [["error invalid request"]]
    assert not server.end.is_set()
    assert not server.record.released


# -- where the context is --------------------------------------------------------------------------


class Destination:
    """A destination with a VM."""

    pid = 4711

    def vm_descriptor(self) -> int:
        return 9

    def duplicate(self, number: int) -> int:
        return os.memfd_create("destination")


class Monitor:
    """Its monitor."""


class Kernel:
    """Moves the context out of one VM only, and notes what was stored meanwhile."""

    def __init__(self, shelf: Shelf, failure: SevhopError | None = None) -> None:
        self.shelf = shelf
        self.failure = failure
        self.has_it = ""
        self.stored: list[list[str]] = []

    async def move(self, monitor: object, pid: int, vm: int, *, deadline: float) -> MoveReport:
        self.stored.append(self.shelf.record["vms"])
        if self.failure is not None:
            raise self.failure
        if os.readlink(f"/proc/self/fd/{vm}") != f"/memfd:{self.has_it} (deleted)":
            raise MoveError("it has no context", errno.EINVAL)
        return MoveReport(1, 0, 0.1)


@pytest.fixture
def moving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[KeeperServer, Shelf, Kernel]:
    server = KeeperServer(config(), KeeperPaths(tmp_path), SourceHandles(os.memfd_create("source"), {}))
    shelf = Shelf()
    kernel = Kernel(shelf)
    monkeypatch.setattr("sevhop_qmp.move.move", kernel.move)
    server._fd_store = shelf
    return server, shelf, kernel


def move_context(server: KeeperServer) -> None:
    run(server._context_vms.move_to(Monitor(), Destination(), 2.0))  # type: ignore[arg-type]


def test_vm_is_stored_before_the_context_is_moved_there(moving: tuple[KeeperServer, Shelf, Kernel]) -> None:
    server, shelf, kernel = moving
    kernel.has_it = "source"
    move_context(server)
    assert kernel.stored == [["source", "vm 1"]]
    assert shelf.record["vms"] == list(shelf.descriptors) == ["vm 1"]


def test_context_stays_after_a_refused_move(moving: tuple[KeeperServer, Shelf, Kernel]) -> None:
    server, shelf, kernel = moving
    kernel.failure = MoveError("busy", errno.EBUSY)
    with pytest.raises(MoveError):
        move_context(server)
    assert shelf.record["vms"] == ["source"]


@pytest.mark.parametrize("has_it", ["source", "destination"])
def test_successor_finds_the_context_after_an_uncertain_move(
    moving: tuple[KeeperServer, Shelf, Kernel], tmp_path: Path, has_it: str
) -> None:
    """The destination hung up, then the keeper died: its successor tries both."""
    server, shelf, kernel = moving
    kernel.failure = MoveUncertain("QEMU hung up")
    with pytest.raises(MoveUncertain):
        move_context(server)
    assert shelf.record["vms"] == ["source", "vm 1"]
    kernel.failure, kernel.has_it = None, has_it

    async def succeed() -> KeeperServer:
        successor = KeeperServer(config(), KeeperPaths(tmp_path), server._handles)
        successor.restore(shelf)
        return successor

    move_context(run(succeed()))
    assert shelf.record["vms"] == list(shelf.descriptors) == ["vm 2"]


def test_monitor_that_does_not_listen_yet_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its bind(2) and its listen(2), QEMU refuses connections."""
    paths = KeeperPaths(tmp_path)
    paths.monitor.parent.mkdir()
    connect = monitor.Monitor.connect
    failures: list[BaseException | None] = []

    async def connected(*arguments: Any, **options: Any) -> monitor.Monitor:
        if len(failures) == 2:
            raise MonitorError("it answers")
        try:
            return await connect(*arguments, **options)
        except MonitorError as err:
            failures.append(err.__cause__)
            if len(failures) == 1:
                bound.bind(str(paths.monitor))
            raise

    monkeypatch.setattr(monitor.Monitor, "connect", connected)
    with socket.socket(socket.AF_UNIX) as bound, pytest.raises(MonitorError, match="it answers"):
        run(keeper_destination.probe(config(), paths))
    assert [type(failure) for failure in failures] == [FileNotFoundError, ConnectionRefusedError]


@pytest.mark.parametrize("stops", [True, False])
def test_destination_is_set_to_shut_down_at_a_reboot_before_the_guest_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: bool
) -> None:
    """Only that of a guest that cannot be reset: no command more than necessary while the guest is stopped."""

    executed: list[str] = []

    class Executing(Monitor):
        version = "10.0.0"

        async def send_fd(self, name: str, fd: int) -> None:
            executed.append("getfd")

        async def execute(self, command: str, arguments: Any = None) -> Any:
            executed.append(command)

    async def nothing(*_: object) -> None:
        pass

    marks = redirect_marks(tmp_path, monkeypatch)
    monkeypatch.setattr(keeper_destination, "verify", nothing)
    server = KeeperServer(replace(config(), stops_at_reboot=stops), KeeperPaths(tmp_path), SourceHandles(None, {}))
    monkeypatch.setattr(server._saved_blocks, "write", lambda *_: None)
    monkeypatch.setattr(server._context_vms, "move_to", nothing)
    server._source = SimpleNamespace(images=None)  # type: ignore[assignment]
    probed: Any = SimpleNamespace(monitor=Executing(), process=Destination(), blocks={})
    run(server._hand_over(probed))
    expected = ["set-action", "getfd", "x-sev-reboot-mark"] if stops else []
    assert executed == [*expected, "x-sev-adopt-finish"]
    assert (marks / "web" / "mark").exists() is stops


@pytest.mark.parametrize("stops", [True, False])
def test_destination_is_notified_that_its_guest_cannot_be_reset(tmp_path: Path, stops: bool) -> None:
    server = KeeperServer(replace(config(), stops_at_reboot=stops), KeeperPaths(tmp_path), SourceHandles(None, {}))
    server.record.state = State.RESTORING
    with socket.socket() as sock:
        answer, _ = run(server.answer_destination(sock, b"hello 1"))
    assert answer.endswith(" reboot=shutdown") is stops


def test_note_of_the_commit_is_reported_and_stored(server: KeeperServer, tmp_path: Path) -> None:
    server.record.note = "n" * 1000
    answer = json.loads(run(ask(server, "status")).removeprefix("ok "))
    assert answer["note"] == "n" * 300
    assert server.record.from_fields(server.record.as_fields()).note == server.record.note
