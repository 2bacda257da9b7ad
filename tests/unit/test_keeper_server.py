"""What the keeper answers libvirt's hook, and what a keeper is told at its start."""

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
from typing import Any

import pytest
from sevhop.keeper.client import Brief, State
from sevhop.keeper.handover import Held
from sevhop.keeper.server import Custody
from sevhop.keeper.supervisor import Deposit
from sevhop.libvirt import hook_server
from sevhop.records.run_directory import listening
from sevhop_qmp import monitor
from sevhop_qmp.errors import MonitorError, MoveError, MoveUncertain, SevhopError
from sevhop_qmp.monitor import peer_credentials
from sevhop_qmp.move import MoveReport
from sevhop_qmp.process import QemuProcess
from sevhop_qmp.ram_blocks import RamBlock
from sevhop_qmp.run_mark import RunState

from .keeper_brief import BLOCKS, UUID, brief


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


async def ask(custody: Custody, request: str) -> str:
    with socket.socket() as sock:
        answer, fd = await custody.answer_control(sock, request.encode())
    assert fd is None
    return answer


@pytest.fixture
def custody(tmp_path: Path) -> Custody:
    (tmp_path / "monitor").mkdir()
    return Custody(brief(), tmp_path, Held(None, {}))


def test_brief_survives_the_way() -> None:
    assert Brief.from_json(brief().as_json()) == brief()


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("step", ["started begin", "reconnect begin", "stopped end", "gibberish -"])
@pytest.mark.parametrize("uuid", ["22222222-2222-3333-4444-555555555501", "-"])
def test_a_foreign_domain_is_left_alone(custody: Custody, state: State, step: str, uuid: str) -> None:
    custody.state = state
    assert run(ask(custody, f"hook {step} {uuid}")) == "foreign"
    assert custody.state is state


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("step", ["restore begin", "prepare begin", "prepare afresh", "migrate begin"])
@pytest.mark.parametrize("uuid", ["22222222-2222-3333-4444-555555555501", "-"])
def test_held_name_is_not_started_by_another_domain(custody: Custody, state: State, step: str, uuid: str) -> None:
    custody.state = state
    answer = run(ask(custody, f"hook {step} {uuid}"))
    assert answer == "foreign" if state is State.OVER else f"holds this name for the domain with UUID {UUID}" in answer
    assert custody.state is state


RESTORABLE = {State.WAITING, State.RESTORING, State.COMMITTED}


@pytest.mark.parametrize("state", State)
def test_only_what_is_held_can_be_restored(custody: Custody, state: State) -> None:
    custody.state = state
    answer = run(ask(custody, f"hook restore begin {UUID.upper()}"))
    assert answer == "ok /opt/qemu" if state in RESTORABLE else answer.startswith("no ")
    assert custody.state is (State.RESTORING if state in RESTORABLE else state)


@pytest.mark.parametrize("state", State)
def test_nobody_starts_a_held_domain_afresh(custody: Custody, state: State) -> None:
    custody.state = state
    answer = run(ask(custody, f"hook prepare afresh {UUID}"))
    assert answer.startswith("no ") == (state not in (State.OVER, State.LOST))


@pytest.mark.parametrize("state", State)
def test_a_restored_domain_is_prepared_after_the_restore_began(custody: Custody, state: State) -> None:
    custody.state = state
    answer = run(ask(custody, f"hook prepare begin {UUID}"))
    assert answer.startswith("no ") == (state in {State.HELD, State.RETIRING, State.WAITING})


@pytest.mark.parametrize("state", set(State) - {State.RESTORING})
def test_nothing_is_committed_without_a_restore(custody: Custody, state: State) -> None:
    custody.state = state
    answer = run(ask(custody, f"hook started begin {UUID}"))
    free = state in (State.OVER, State.LOST)
    assert answer == ("ok" if free else f"no the guest is {state.value}, there is nothing to start")


@pytest.mark.parametrize("state", set(State) - {State.RESTORING})
def test_no_destination_is_served_without_a_restore(custody: Custody, state: State) -> None:
    custody.state = state
    with socket.socket() as sock:
        answer, fd = run(custody.answer_destination(sock, b"hello 1"))
    assert answer.startswith("no ")
    assert fd is None


def test_one_restore_at_a_time(custody: Custody) -> None:
    """This test is the destination, and whoever has started it restores the domain."""

    async def work() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            await custody.answer_control(ours, f"hook restore begin {UUID}".encode())
            await custody.answer_destination(ours, b"hello 1")
            answer, _ = await custody.answer_control(ours, f"hook restore begin {UUID}".encode())
            assert answer == "no the guest is being restored already"

    custody.state = State.WAITING
    run(work())


def test_destination_is_told_that_the_source_has_ended(custody: Custody) -> None:
    custody.state = State.RESTORING
    with socket.socket() as sock:
        answer, _ = run(custody.answer_destination(sock, b"hello 1"))
    assert answer.startswith("ok context=sev source=ended handle=7 measurement=abab")


#: A source that has locked its image, as QEMU does, and does what it is told.
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

    def go_on(self) -> None:
        """Give up the image, or the second time take it back."""
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


def test_source_is_ended_once_it_has_given_up_its_images(tmp_path: Path, source: Source) -> None:
    custody = Custody(replace(brief(), pid=source.process.pid), tmp_path, Held(None, {}))
    source.go_on()
    assert run(ask(custody, "retire")) == "ok"
    assert custody.state is State.WAITING
    assert source.process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("resumed", ["before it gave up its images", "after that"])
def test_source_that_was_resumed_goes_on(tmp_path: Path, source: Source, resumed: str) -> None:
    custody = Custody(replace(brief(), pid=source.process.pid), tmp_path, Held(None, {}))
    if resumed == "after that":
        source.go_on()
        source.go_on()
    assert run(ask(custody, "retire")) == "no somebody else has resumed the guest"
    assert custody.state is State.HELD
    if resumed != "after that":
        source.go_on()


def test_source_that_has_ended_by_itself_is_not_needed(tmp_path: Path, source: Source) -> None:
    custody = Custody(replace(brief(), pid=source.process.pid), tmp_path, Held(None, {}))
    source.process.kill()
    source.process.wait()
    assert run(ask(custody, "retire")) == "ok"
    assert custody.state is State.WAITING


# -- whether the guest has run ---------------------------------------------------------------------


@pytest.fixture
def destination() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing, and answers nothing."""
    with subprocess.Popen(["sleep", "infinity"]) as process:
        yield process
        process.send_signal(signal.SIGCONT)
        process.kill()


def leave_mark(custody: Custody, state: RunState) -> None:
    """As the library in a destination does."""
    os.pwrite(custody._run_mark.fileno(), bytes([state]), 0)


def committed(custody: Custody, destination: subprocess.Popen[bytes]) -> None:
    """The destination may run the guest, and nobody has seen it yet."""
    custody.state = State.COMMITTED
    custody._destination = QemuProcess.open(destination.pid)


@pytest.mark.parametrize("state", [State.WAITING, State.RESTORING, State.COMMITTED])
def test_guest_that_has_run_is_not_restored_once_more(custody: Custody, state: State) -> None:
    custody.state = state
    leave_mark(custody, RunState.RAN)
    assert run(ask(custody, f"hook restore begin {UUID}")) == "no the guest has run in a new QEMU already"
    assert run(ask(custody, f"hook started begin {UUID}")) == "no the guest has run in a new QEMU already"
    assert custody.state is state


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("keeper", ["lives", "died before"])
def test_destination_that_ends_behind_the_commit(
    ran: bool, keeper: str, custody: Custody, tmp_path: Path, destination: subprocess.Popen[bytes]
) -> None:
    """Proof that the guest has not run is needed to restore it once more."""

    async def work() -> Custody:
        shelf = Shelf()
        custody.take_up(shelf)
        committed(custody, destination)
        custody._enter(State.COMMITTED)
        leave_mark(custody, RunState.RAN if ran else RunState.NOT)
        destination.kill()
        destination.wait()
        heir = custody
        if keeper != "lives":
            heir = Custody(brief(), tmp_path, Held(None, {}))
            heir._run_mark = custody._run_mark  # it was forked from whoever made it
            heir.take_up(shelf)
        await heir._until_it_runs(heir._destination or pytest.fail("it has no destination"), None)
        return heir

    heir = run(work())
    assert heir.state is (State.LOST if ran else State.WAITING)
    assert heir.reason


def test_guest_that_has_run_is_over_although_its_qemu_tells_nothing(
    custody: Custody, destination: subprocess.Popen[bytes]
) -> None:
    async def work() -> None:
        committed(custody, destination)
        leave_mark(custody, RunState.RAN)
        destination.send_signal(signal.SIGSTOP)
        await custody._until_it_runs(custody._destination or pytest.fail("it has no destination"), None)

    run(work())
    assert custody.state is State.OVER


@pytest.mark.parametrize("ran", [False, True])
def test_revoking_ends_only_a_destination_that_has_not_run_the_guest(
    ran: bool, custody: Custody, destination: subprocess.Popen[bytes]
) -> None:
    committed(custody, destination)
    leave_mark(custody, RunState.RAN if ran else RunState.NOT)
    answer = run(ask(custody, "revoke"))
    if ran:
        assert (answer, custody.state) == ("no the guest has run in a new QEMU already", State.COMMITTED)
        assert destination.poll() is None
    else:
        assert (answer, custody.state) == ("ok", State.WAITING)
        assert destination.wait() == -signal.SIGKILL


def test_a_revoked_restore_is_not_committed(custody: Custody) -> None:
    custody.state = State.WAITING
    assert run(ask(custody, f"hook restore begin {UUID}")) == "ok /opt/qemu"
    assert run(ask(custody, "revoke")) == "ok"
    assert run(ask(custody, f"hook started begin {UUID}")).startswith("no ")
    assert run(ask(custody, f"hook restore begin {UUID}")) == "again /opt/qemu"


@pytest.mark.parametrize("request_text", ["", " ", "emulator", "emulator ", "hook", "hook a b", "nonsense", "blocks x"])
def test_nonsense_changes_nothing(custody: Custody, request_text: str) -> None:
    custody.state = State.WAITING
    assert run(ask(custody, request_text)).startswith("no ")
    assert custody.state is State.WAITING


def test_another_emulator(custody: Custody) -> None:
    custody.state = State.WAITING
    assert run(ask(custody, "emulator /old qemu")) == "ok"
    assert run(ask(custody, f"hook restore begin {UUID}")) == "ok /old qemu"


def test_a_second_restore_is_told_to_be_one(custody: Custody, tmp_path: Path) -> None:
    custody.state = State.WAITING
    assert run(ask(custody, f"hook restore begin {UUID}")) == "ok /opt/qemu"
    custody.state = State.WAITING
    assert run(ask(custody, f"hook restore begin {UUID}")) == "again /opt/qemu"


# -- what outlives a keeper ------------------------------------------------------------------------


class Shelf(Deposit):
    """A guardian that passes on what was put there."""

    def __init__(self) -> None:
        super().__init__({}, {})
        self.needed = False

    def put(self, record: Mapping[str, Any], descriptors: Mapping[str, int], *, needed: bool) -> None:
        # As it goes over the wire.
        self.record, self.needed = json.loads(json.dumps(record)), needed
        self.descriptors = {name: os.dup(fd) for name, fd in descriptors.items()}


async def succeed(custody: Custody, state: State, tmp_path: Path) -> Custody:
    """A keeper that dies in a state, and the next one."""
    shelf = Shelf()
    custody.take_up(shelf)
    custody._enter(state)
    successor = Custody(brief(), tmp_path, Held(None, {}))
    successor.take_up(shelf)
    return successor


@pytest.mark.parametrize("state", set(State) - {State.RETIRING})
def test_the_next_keeper_goes_on(custody: Custody, tmp_path: Path, state: State) -> None:
    async def work() -> None:
        await ask(custody, "emulator /other")
        successor = await succeed(custody, state, tmp_path)
        assert successor.state is state
        assert successor._status() == custody._status()
        assert not successor.end.is_set()

    run(work())


def test_kept_blocks_outlive_the_keeper(custody: Custody, tmp_path: Path) -> None:
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
    of_this_test = replace(brief(), blocks=blocks)

    async def work() -> None:
        shelf = Shelf()
        custody = Custody(of_this_test, tmp_path, Held(None, {}))
        custody.take_up(shelf)
        assert await ask(custody, "blocks") == "ok"
        assert await ask(custody, "blocks") == "ok"
        successor = Custody(of_this_test, tmp_path, Held(None, {}))
        successor.take_up(shelf)
        assert successor._kept == custody._kept
        assert successor._kept["pc.rom"].parts == ((page, b"first".ljust(page, b"\0")),)
        assert successor._kept["tables"].parts == ((page, b"las"),)
        assert successor._kept["empty"].parts == ()

    run(work())


NEEDED = {State.RETIRING, State.WAITING, State.RESTORING, State.COMMITTED}


@pytest.mark.parametrize("state", State)
def test_sigterm_ends_no_keeper_that_the_guest_may_need(custody: Custody, state: State) -> None:
    shelf = Shelf()

    async def work() -> None:
        custody.take_up(shelf)
        custody._enter(state)
        custody.terminate()

    run(work())
    assert shelf.needed == (state in NEEDED)
    assert custody.end.is_set() == (state not in NEEDED)


def test_requests_may_be_repeated(tmp_path: Path, source: Source) -> None:
    custody = Custody(replace(brief(), pid=source.process.pid), tmp_path, Held(None, {}))
    source.go_on()
    for state in (State.HELD, State.WAITING, State.RESTORING, State.COMMITTED, State.OVER):
        custody.state = state
        assert run(ask(custody, "retire")) == "ok"
        assert custody.state is (State.WAITING if state is State.HELD else state)


@pytest.mark.parametrize("resumed", [False, True])
def test_the_next_keeper_ends_a_source_that_is_halted(tmp_path: Path, source: Source, resumed: bool) -> None:
    of_source = replace(brief(), pid=source.process.pid)
    custody = Custody(of_source, tmp_path, Held(None, {}))
    successor = Custody(of_source, tmp_path, Held(None, {}))
    if not resumed:
        source.go_on()

    async def work() -> None:
        shelf = Shelf()
        custody.take_up(shelf)
        custody._enter(State.RETIRING)
        source.process.send_signal(signal.SIGSTOP)
        successor.take_up(shelf)
        assert (await ask(successor, "retire") == "ok") == (not resumed)

    run(work())
    assert successor.state is (State.HELD if resumed else State.WAITING)
    if resumed:
        source.go_on()


def test_one_that_dies_while_it_lets_go_is_not_followed(custody: Custody, tmp_path: Path) -> None:
    async def work() -> Custody:
        shelf = Shelf()
        custody.take_up(shelf)
        custody._enter(State.WAITING)
        assert await ask(custody, "release") == "ok"
        assert not shelf.needed
        successor = Custody(brief(), tmp_path, Held(None, {}))
        successor.take_up(shelf)
        return successor

    assert run(work()).end.is_set()


def test_a_status_does_not_end_a_keeper_whose_command_has_not_come_back(custody: Custody) -> None:
    """The command is this very test, and only another process asks."""

    async def work() -> None:
        custody.take_up(Shelf())
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        serving = asyncio.ensure_future(custody._until_hangup(theirs, answer_stranger))
        custody._commands.add(theirs)
        ours.close()
        await serving
        assert not custody.end.is_set()

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
    """What a process of some user is answered; nothing when it is hung up on."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _PEER, str(path), str(uid), *requests, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    out, _ = await process.communicate()
    return [line for line in out.decode().splitlines() if line]


async def served(custody: Custody, path: Path, uid: int, serve: Any, *peers: tuple[int, str]) -> list[list[str]]:
    """What peers are answered, one after the other, by a socket that anybody may open."""
    with listening(path, uid) as listener:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.stat().st_uid == uid
        path.chmod(0o666)
        task = asyncio.ensure_future(custody.listen(listener, uid, serve))
        answers = [await connect_as(peer, path, request) for peer, request in peers]
        task.cancel()
        await asyncio.wait({task})
        return answers


def test_control_is_roots_alone(custody: Custody, open_directory: Path) -> None:
    serve = custody.answer_control
    answers = run(served(custody, open_directory / "s", 0, serve, (NOBODY, "status"), (0, f"hook x y {UUID}")))
    assert answers == [[], ["ok"]]
    assert custody.state is State.HELD


def test_the_hooks_socket_is_roots_alone(custody: Custody, open_directory: Path) -> None:
    heard: list[int] = []
    path = open_directory / "hook"

    def serve(sock: socket.socket, *_: object) -> None:
        with sock:
            heard.append(peer_credentials(sock)[1])

    async def work() -> None:
        with listening(path, 0) as listener:
            path.chmod(0o666)
            task = asyncio.ensure_future(hook_server.listen(listener, custody.answer_hook))
            for uid in (NOBODY, 0):
                await connect_as(uid, path, "web")
            task.cancel()
            await asyncio.wait({task})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hook_server, "_serve", serve)
        run(work())
    assert heard == [0]


def test_the_memory_is_for_the_users_of_qemu_alone(custody: Custody, open_directory: Path) -> None:
    custody.state = State.RESTORING
    serve = custody.answer_destination
    answers = run(served(custody, open_directory / "s", 1234, serve, (NOBODY, "hello 1"), (1234, "hello 1")))
    assert answers[0] == []
    assert answers[1][0].startswith("ok ")


def test_the_memory_is_for_one_destination_alone(custody: Custody, open_directory: Path) -> None:
    """Who spoke first is the destination, until libvirt starts another one."""
    custody.state = State.RESTORING
    serve = custody.answer_destination
    path = open_directory / "s"
    answers = run(served(custody, path, NOBODY, serve, (NOBODY, "hello 1"), (NOBODY, "hello 1")))
    assert answers[0][0].startswith("ok ")
    assert answers[1][0].startswith("no process ")
    path.unlink()

    async def again() -> list[list[str]]:
        await ask(custody, f"hook restore begin {UUID}")
        return await served(custody, path, NOBODY, serve, (NOBODY, "hello 1"))

    (open_directory / "monitor").mkdir()
    assert run(again())[0][0].startswith("ok ")


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

    async def execute(self, command: str, arguments: object) -> None:
        pass


class Kernel:
    """Moves the context out of one VM only, and notes what was on the shelf meanwhile."""

    def __init__(self, shelf: Shelf, fate: SevhopError | None = None) -> None:
        self.shelf = shelf
        self.fate = fate
        self.has_it = ""
        self.stored: list[list[str]] = []

    async def move(self, monitor: object, pid: int, vm: int, *, deadline: float) -> MoveReport:
        self.stored.append(self.shelf.record["vms"])
        if self.fate is not None:
            raise self.fate
        if os.readlink(f"/proc/self/fd/{vm}") != f"/memfd:{self.has_it} (deleted)":
            raise MoveError("it has no context", errno.EINVAL)
        return MoveReport(1, 0, 0.1)


@pytest.fixture
def moving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Custody, Shelf, Kernel]:
    custody = Custody(brief(), tmp_path, Held(os.memfd_create("source"), {}))
    shelf = Shelf()
    kernel = Kernel(shelf)
    monkeypatch.setattr("sevhop_qmp.move.move", kernel.move)
    custody._deposit = shelf
    return custody, shelf, kernel


def move_context(custody: Custody) -> None:
    run(custody._move_context(Monitor(), Destination()))  # type: ignore[arg-type]


def test_the_vm_is_stored_before_the_context_is_moved_there(moving: tuple[Custody, Shelf, Kernel]) -> None:
    custody, shelf, kernel = moving
    kernel.has_it = "source"
    move_context(custody)
    assert kernel.stored == [["source", "vm 1"]]
    assert shelf.record["vms"] == list(shelf.descriptors) == ["vm 1"]


def test_after_a_refusal_the_context_is_where_it_was(moving: tuple[Custody, Shelf, Kernel]) -> None:
    custody, shelf, kernel = moving
    kernel.fate = MoveError("busy", errno.EBUSY)
    with pytest.raises(MoveError):
        move_context(custody)
    assert shelf.record["vms"] == ["source"]


@pytest.mark.parametrize("has_it", ["source", "destination"])
def test_a_keeper_that_was_not_told_finds_the_context(
    moving: tuple[Custody, Shelf, Kernel], tmp_path: Path, has_it: str
) -> None:
    """The destination fell silent, then the keeper died: its successor tries both."""
    custody, shelf, kernel = moving
    kernel.fate = MoveUncertain("QEMU hung up")
    with pytest.raises(MoveUncertain):
        move_context(custody)
    assert shelf.record["vms"] == ["source", "vm 1"]
    kernel.fate, kernel.has_it = None, has_it

    async def succeed() -> Custody:
        successor = Custody(brief(), tmp_path, custody._held)
        successor.take_up(shelf)
        return successor

    move_context(run(succeed()))
    assert shelf.record["vms"] == list(shelf.descriptors) == ["vm 2"]


def test_a_monitor_that_does_not_listen_yet_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its bind(2) and its listen(2), QEMU refuses connections."""
    path = tmp_path / "qmp"
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
                bound.bind(str(path))
            raise

    monkeypatch.setattr(monitor.Monitor, "connect", connected)
    with socket.socket(socket.AF_UNIX) as bound, pytest.raises(MonitorError, match="it answers"):
        run(Custody(brief(), tmp_path, Held(None, {}))._meet(path))
    assert [type(failure) for failure in failures] == [FileNotFoundError, ConnectionRefusedError]
