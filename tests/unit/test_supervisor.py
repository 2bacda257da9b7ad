"""The guardian, with keepers that die as the test wants."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from sevhop.keeper.supervisor import Deposit, Guardian, protect

_PATIENCE = 30.0
_CAP_SYS_RESOURCE = 24


class Story:
    """What the keepers of one guardian tell, a line each; and the process of that guardian."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def tell(self, line: object) -> None:
        with self.path.open("a") as file:
            file.write(f"{line}\n")

    @property
    def lines(self) -> list[str]:
        return self.path.read_text().splitlines()

    def begin(self, work: Callable[[Deposit], int], **options: float) -> int:
        """Fork a guardian. :return: its pid."""
        pid = os.fork()
        if pid == 0:
            try:
                os._exit(Guardian(work, **options).run())  # type: ignore[arg-type]
            finally:
                os._exit(99)
        return pid

    def run(self, work: Callable[[Deposit], int], **options: float) -> int:
        """Until it has ended. :return: its exit code."""
        return exit_code(self.begin(work, **options))


def exit_code(pid: int) -> int:
    """Of a child, when it has ended."""
    ended = os.pidfd_open(pid)
    readable, _, _ = select.select([ended], [], [], _PATIENCE)
    os.close(ended)
    if not readable:
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return Story(tmp_path / "story")


def memfd(content: bytes) -> int:
    fd = os.memfd_create("test")
    os.write(fd, content)
    return fd


def test_the_next_keeper_has_what_the_last_one_put_there(story: Story) -> None:
    def work(deposit: Deposit) -> int:
        story.tell(deposit.record)
        if not deposit.record:
            deposit.put({"step": 1}, {"a": memfd(b"first"), "b": memfd(b"other")}, needed=True)
            deposit.put({"step": 2}, {"a": memfd(b"second")}, needed=True)
            die()
        assert list(deposit.descriptors) == ["a"]
        story.tell(os.pread(deposit.descriptors["a"], 99, 0).decode())
        return 0

    assert story.run(work) == 0
    assert story.lines == ["{}", "{'step': 2}", "second"]


def test_descriptors_that_were_replaced_are_closed(story: Story) -> None:
    def memfds() -> int:
        guardian = Path(f"/proc/{os.getppid()}/fd")
        return sum(os.readlink(link).startswith("/memfd:test") for link in guardian.iterdir() if link.is_symlink())

    def work(deposit: Deposit) -> int:
        if not deposit.record:
            for _ in range(20):
                deposit.put({"begun": True}, {"a": memfd(b""), "b": memfd(b"")}, needed=True)
            deposit.put({"begun": True}, {"a": memfd(b"")}, needed=True)
            die()
        story.tell(memfds())
        deposit.put({"again": True}, {}, needed=True)
        if len(story.lines) < 2:
            die()
        return 0

    assert story.run(work) == 0
    assert story.lines == ["1", "0"]


def test_an_exception_is_a_death(story: Story) -> None:
    def work(deposit: Deposit) -> int:
        story.tell("began")
        if len(story.lines) == 1:
            raise ValueError("a bug")
        return 0

    assert story.run(work) == 0
    assert story.lines == ["began", "began"]


def test_a_loop_of_deaths_ends_when_the_guest_needs_no_keeper(story: Story) -> None:
    def work(deposit: Deposit) -> int:
        story.tell("began")
        die()
        return 0

    assert story.run(work, respawns=3) == 1
    assert len(story.lines) == 1 + 3


def test_a_needed_keeper_is_never_given_up(story: Story) -> None:
    def work(deposit: Deposit) -> int:
        story.tell("began")
        deposit.put({"state": "waiting"}, {}, needed=True)
        if len(story.lines) < 5:
            die()
        return 0

    # With no pause every death is one of a keeper that has lived long enough.
    assert story.run(work, respawns=1, pause=0.2) == 0
    assert len(story.lines) == 5


def test_the_guardian_is_killed_and_the_keeper_goes_on(story: Story) -> None:
    ready, tell = os.pipe()
    done, finish = os.pipe()

    def work(deposit: Deposit) -> int:
        guardian = os.getppid()
        ended = os.pidfd_open(guardian)
        deposit.put({"n": 1}, {}, needed=True)
        os.write(tell, b"!")
        select.select([ended], [], [])
        for n in range(3):
            deposit.put({"n": n}, {}, needed=True)
        story.tell("went on")
        os.write(finish, b"!")
        return 0

    pid = story.begin(work)
    os.read(ready, 1)
    os.kill(pid, signal.SIGKILL)
    assert exit_code(pid) == -signal.SIGKILL
    assert select.select([done], [], [], _PATIENCE)[0]
    assert story.lines == ["went on"]
    for fd in (ready, tell, done, finish):
        os.close(fd)


def test_sigterm_is_passed_on(story: Story) -> None:
    ready, tell = os.pipe()

    def work(deposit: Deposit) -> int:
        os.write(tell, b"!")
        story.tell(signal.Signals(signal.sigwait({signal.SIGTERM})).name)
        return 0

    pid = story.begin(work)
    os.read(ready, 1)
    os.kill(pid, signal.SIGTERM)
    assert exit_code(pid) == 0
    assert story.lines == ["SIGTERM"]
    os.close(ready)
    os.close(tell)


def test_protected(story: Story) -> None:
    def work(deposit: Deposit) -> int:
        protect()
        for number in (signal.SIGHUP, signal.SIGINT):
            os.kill(os.getpid(), number)
        story.tell(os.getcwd())
        story.tell(Path("/proc/self/oom_score_adj").read_text().strip())
        return 0

    before = Path("/proc/self/oom_score_adj").read_text().strip()
    permitted = int(Path("/proc/self/status").read_text().split("CapEff:")[1].split()[0], 16) >> _CAP_SYS_RESOURCE & 1
    assert story.run(work) == 0
    assert story.lines == ["/", "-1000" if permitted else before]
