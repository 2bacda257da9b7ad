"""The supervisor, with keepers that die where the test wants."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from sevhop.keeper.fdstore import FdStore
from sevhop.keeper.supervisor import Supervisor, protect

_PATIENCE = 30.0
_CAP_SYS_RESOURCE = 24


class Log:
    """What the keepers of one supervisor write, a line each; and the process of that supervisor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def write(self, line: object) -> None:
        with self.path.open("a") as file:
            file.write(f"{line}\n")

    @property
    def lines(self) -> list[str]:
        return self.path.read_text().splitlines()

    def start(self, work: Callable[[FdStore], int], **options: float) -> int:
        """Fork a supervisor. :return: its pid."""
        pid = os.fork()
        if pid == 0:
            try:
                os._exit(Supervisor(work, **options).run())  # type: ignore[arg-type]
            finally:
                os._exit(99)
        return pid

    def run(self, work: Callable[[FdStore], int], **options: float) -> int:
        """Start one, and wait until it exits. :return: its exit code."""
        return exit_code(self.start(work, **options))


def exit_code(pid: int) -> int:
    """Of a child, when it has exited."""
    ended = os.pidfd_open(pid)
    readable, _, _ = select.select([ended], [], [], _PATIENCE)
    os.close(ended)
    if not readable:
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "log")


def memfd(content: bytes) -> int:
    fd = os.memfd_create("test")
    os.write(fd, content)
    return fd


def test_next_keeper_gets_the_last_checkpoint(log: Log) -> None:
    def work(fd_store: FdStore) -> int:
        log.write(fd_store.record)
        if not fd_store.record:
            fd_store.store({"step": 1}, {"a": memfd(b"first"), "b": memfd(b"other")}, needed=True)
            fd_store.store({"step": 2}, {"a": memfd(b"second")}, needed=True)
            die()
        assert list(fd_store.descriptors) == ["a"]
        log.write(os.pread(fd_store.descriptors["a"], 99, 0).decode())
        return 0

    assert log.run(work) == 0
    assert log.lines == ["{}", "{'step': 2}", "second"]


def test_descriptors_that_were_replaced_are_closed(log: Log) -> None:
    def memfds() -> int:
        supervisor = Path(f"/proc/{os.getppid()}/fd")
        return sum(os.readlink(link).startswith("/memfd:test") for link in supervisor.iterdir() if link.is_symlink())

    def work(fd_store: FdStore) -> int:
        if not fd_store.record:
            for _ in range(20):
                fd_store.store({"begun": True}, {"a": memfd(b""), "b": memfd(b"")}, needed=True)
            fd_store.store({"begun": True}, {"a": memfd(b"")}, needed=True)
            die()
        log.write(memfds())
        fd_store.store({"again": True}, {}, needed=True)
        if len(log.lines) < 2:
            die()
        return 0

    assert log.run(work) == 0
    assert log.lines == ["1", "0"]


def test_keeper_is_restarted_after_an_exception(log: Log) -> None:
    def work(fd_store: FdStore) -> int:
        log.write("began")
        if len(log.lines) == 1:
            raise ValueError("a bug")
        return 0

    assert log.run(work) == 0
    assert log.lines == ["began", "began"]


def test_crash_loop_ends_when_the_guest_needs_no_keeper(log: Log) -> None:
    def work(fd_store: FdStore) -> int:
        log.write("began")
        die()
        return 0

    assert log.run(work, respawns=3) == 1
    assert len(log.lines) == 1 + 3


def test_needed_keeper_is_always_restarted(log: Log) -> None:
    def work(fd_store: FdStore) -> int:
        log.write("began")
        fd_store.store({"state": "waiting"}, {}, needed=True)
        if len(log.lines) < 5:
            die()
        return 0

    # With no pause every death is one of a keeper that has lived long enough.
    assert log.run(work, respawns=1, pause=0.2) == 0
    assert len(log.lines) == 5


def test_keeper_continues_when_the_supervisor_is_killed(log: Log) -> None:
    ready, tell = os.pipe()
    done, finish = os.pipe()

    def work(fd_store: FdStore) -> int:
        supervisor = os.getppid()
        ended = os.pidfd_open(supervisor)
        fd_store.store({"n": 1}, {}, needed=True)
        os.write(tell, b"!")
        select.select([ended], [], [])
        for n in range(3):
            fd_store.store({"n": n}, {}, needed=True)
        log.write("continues")
        os.write(finish, b"!")
        return 0

    pid = log.start(work)
    os.read(ready, 1)
    os.kill(pid, signal.SIGKILL)
    assert exit_code(pid) == -signal.SIGKILL
    assert select.select([done], [], [], _PATIENCE)[0]
    assert log.lines == ["continues"]
    for fd in (ready, tell, done, finish):
        os.close(fd)


def test_sigterm_is_forwarded_to_the_keeper(log: Log) -> None:
    ready, tell = os.pipe()

    def work(fd_store: FdStore) -> int:
        os.write(tell, b"!")
        log.write(signal.Signals(signal.sigwait({signal.SIGTERM})).name)
        return 0

    pid = log.start(work)
    os.read(ready, 1)
    os.kill(pid, signal.SIGTERM)
    assert exit_code(pid) == 0
    assert log.lines == ["SIGTERM"]
    os.close(ready)
    os.close(tell)


def test_protected_process_ignores_signals(log: Log) -> None:
    def work(fd_store: FdStore) -> int:
        protect()
        for number in (signal.SIGHUP, signal.SIGINT):
            os.kill(os.getpid(), number)
        log.write(os.getcwd())
        log.write(Path("/proc/self/oom_score_adj").read_text().strip())
        return 0

    before = Path("/proc/self/oom_score_adj").read_text().strip()
    permitted = int(Path("/proc/self/status").read_text().split("CapEff:")[1].split()[0], 16) >> _CAP_SYS_RESOURCE & 1
    assert log.run(work) == 0
    assert log.lines == ["/", "-1000" if permitted else before]
