"""
The realtime priority of threads during the downtime: it is always reset, however the command ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest

from tests.support.guests.machine import Machine
from tests.support.guests.running import Guest, processes_of, wait_until

from .conftest import DescribeCounter, StartGuest
from .hops import HopDriver, assert_unharmed
from .interrupted import interrupt_hop, recover
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


def test_library_resets_priority_before_the_guest_runs(
    guest: Guest, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the command nor the watchdog does it here."""
    seen: list[str] = []
    monkeypatch.setattr("sevhop.engine.prepare.Watchdog", NoWatchdog)
    monkeypatch.setattr("sevhop.engine.realtime_reset.reset", lambda _: None)
    report = HopDriver().run(guest, new)
    assert report.outcome == "done"
    guest.wait_for_ticks(3)
    # The first thread is boosted until the guest runs, and is reset then.
    wait_until(lambda: not with_priority(guest.pid), 10, f"no thread has a priority, {seen}")
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))  # ours, which nobody has reset
    assert_unharmed(guest)


class NoWatchdog:
    """A watchdog that does nothing."""

    @classmethod
    def start(cls) -> NoWatchdog:
        return cls()

    def watch(self, *_: int) -> None:
        return

    async def close(self) -> None:
        return


@pytest.mark.parametrize("point", ["phase stop", "before stop 0", "after stop 0", "phase load", "after stream-end 0"])
def test_killed_command_leaves_no_priority(
    point: str, old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    guest = start(counter_machine(cpus=2, more=SANDBOX), old)
    guest.wait_for_ticks(3)
    assert interrupt_hop(guest, new, point, "command") == -signal.SIGKILL
    for pid in processes_of(guest.machine.directory):
        wait_until(lambda pid=pid: not with_priority(pid), 10, "no thread has a priority")  # type: ignore[misc]
    assert recover()["status"] == 0
    assert_unharmed(guest)


def test_timer_slack_is_restored(old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest) -> None:
    """A thread with a realtime priority has none; afterwards the kernel gives it the default."""
    guest = start(counter_machine(), old)
    pid = guest.pid

    def slack(process: int) -> str:
        return Path(f"/proc/{process}/timerslack_ns").read_text()

    Path(f"/proc/{pid}/timerslack_ns").write_text("31415")

    def fail(_: object) -> None:
        raise OSError

    with contextlib.suppress(Exception):
        HopDriver().run(guest, new, at="map", fault=fail)
    assert (guest.pid, slack(pid)) == (pid, "31415\n")
    HopDriver().run(guest, new)
    assert (guest.pid != pid, slack(guest.pid)) == (True, "31415\n")
    assert_unharmed(guest)
