"""
The real-time priority that a hop lends for the moment in which the guest stands still: nothing of it is left, whatever
ends the command.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest

from tests.support.guests.machine import Machine
from tests.support.guests.running import Guest, processes_of, wait_until

from .broken_off import break_off, recover
from .conftest import DescribeCounter, StartGuest
from .hops import Meddler, assert_unharmed
from .launched import Launched, user

NOBODY = 65534
SANDBOX = ("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give priorities")


def with_priority(pid: int) -> list[str]:
    """The names of the threads of a process that have one."""
    found = []
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError):
            if os.sched_getscheduler(int(thread)) & ~os.SCHED_RESET_ON_FORK != os.SCHED_OTHER:
                found.append(f"{thread} {Path(f'/proc/{pid}/task/{thread}/comm').read_text().strip()}")
    return found


@pytest.fixture(params=["user", "sandbox", "user-and-sandbox"])
def guest(
    request: pytest.FixtureRequest, old: Path, counter_machine: DescribeCounter, start: StartGuest, open_directory: Path
) -> Guest:
    """One whose QEMU may not do everything with its own threads."""
    kind = request.param
    machine = counter_machine(cpus=2, more=SANDBOX if "sandbox" in kind else ())
    if "user" in kind:
        os.chown(open_directory, NOBODY, NOBODY)
        machine = Machine(**{**vars(machine), "directory": open_directory, "accelerator": "tcg"})
        machine = Launched.like(machine, *user(NOBODY))
    guest = start(machine, old)
    guest.wait_for_ticks(3)
    return guest


def test_library_takes_it_back_before_the_guest_runs(guest: Guest, new: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else does: neither the command nor the watch has a say in it."""
    seen: list[str] = []
    monkeypatch.setattr("sevhop.engine.hop.Watch", NoWatch)
    monkeypatch.setattr("sevhop.engine.realtime_reset.take_back", lambda _: None)
    report = Meddler().run(guest, new)
    assert report.outcome == "done"
    guest.wait_for_ticks(3)
    # The first thread has it until the guest runs, and gives it back then.
    wait_until(lambda: not with_priority(guest.pid), 10, f"no thread has a priority, {seen}")
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))  # ours, which nobody has taken back
    assert_unharmed(guest)


class NoWatch:
    """In its place: it does nothing."""

    @classmethod
    def start(cls) -> NoWatch:
        return cls()

    def over(self, *_: int) -> None:
        return

    async def close(self) -> None:
        return


@pytest.mark.parametrize("point", ["phase freeze", "before stop 0", "after stop 0", "phase load", "after stream-end 0"])
def test_killed_command_leaves_none(
    point: str, old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    guest = start(counter_machine(cpus=2, more=SANDBOX), old)
    guest.wait_for_ticks(3)
    assert break_off(guest, new, point, "command") == -signal.SIGKILL
    for pid in processes_of(guest.machine.directory):
        wait_until(lambda pid=pid: not with_priority(pid), 10, "no thread has a priority")  # type: ignore[misc]
    assert recover()["status"] == 0
    assert_unharmed(guest)


def test_timer_slack_is_what_it_was(old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest) -> None:
    """A thread with a priority has none; afterwards the kernel gives it the one that it was born with."""
    guest = start(counter_machine(), old)
    pid = guest.pid

    def slack(process: int) -> str:
        return Path(f"/proc/{process}/timerslack_ns").read_text()

    Path(f"/proc/{pid}/timerslack_ns").write_text("31415")

    def fail(_: object) -> None:
        raise OSError

    with contextlib.suppress(Exception):
        Meddler().run(guest, new, at="share", mischief=fail)
    assert (guest.pid, slack(pid)) == (pid, "31415\n")
    Meddler().run(guest, new)
    assert (guest.pid != pid, slack(guest.pid)) == (True, "31415\n")
    assert_unharmed(guest)
