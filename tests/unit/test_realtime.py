"""Threads are boosted during the downtime, and not longer."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sevhop.engine.realtime import Watchdog, boosted, timer_slack_restored
from sevhop.engine.realtime_reset import reset_boosted

from tests.support.guests.running import wait_until

BOOSTED = os.SCHED_RR | os.SCHED_RESET_ON_FORK


@pytest.fixture
def process() -> Iterator[int]:
    with subprocess.Popen(["sleep", "infinity"]) as process:
        yield process.pid
        process.kill()


def test_thread_is_boosted_for_a_while(process: int) -> None:
    with boosted(0, process):
        assert [os.sched_getscheduler(thread) for thread in (0, process)] == [BOOSTED, BOOSTED]
        child = subprocess.run(["chrt", "--pid", "0"], capture_output=True, text=True, check=True)
        assert "SCHED_OTHER" in child.stdout
    assert [os.sched_getscheduler(thread) for thread in (0, process)] == [os.SCHED_OTHER, os.SCHED_OTHER]


def test_thread_is_reset_after_a_failure(process: int) -> None:
    with pytest.raises(ZeroDivisionError), boosted(0, process):
        raise ZeroDivisionError
    assert [os.sched_getscheduler(thread) for thread in (0, process)] == [os.SCHED_OTHER, os.SCHED_OTHER]


def test_thread_with_its_own_policy_keeps_it(process: int) -> None:
    os.sched_setscheduler(process, os.SCHED_FIFO, os.sched_param(5))
    with boosted(0, process):
        assert os.sched_getscheduler(process) == os.SCHED_FIFO
    reset_boosted([process])
    assert (os.sched_getscheduler(process), os.sched_getparam(process).sched_priority) == (os.SCHED_FIFO, 5)


def test_first_threads_have_the_higher_priority(process: int) -> None:
    with boosted(process, first=True), boosted(0, process):
        assert [os.sched_getparam(thread).sched_priority for thread in (0, process)] == [1, 2]


@pytest.mark.parametrize("priority", [1, 2])
def test_thread_left_boosted_by_a_killed_command_is_reset(process: int, priority: int) -> None:
    os.sched_setscheduler(process, BOOSTED, os.sched_param(priority))
    reset_boosted([process])
    assert os.sched_getscheduler(process) == os.SCHED_OTHER


def test_thread_that_has_exited_is_ignored() -> None:
    with boosted(0, 2**22 + 1):
        assert os.sched_getscheduler(0) == BOOSTED
    reset_boosted([2**22 + 1])
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_boost_is_skipped_if_the_host_forbids_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", forbidden)
    with boosted(0):
        pass
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_flag_that_the_library_could_not_reset_is_reset(process: int) -> None:
    os.sched_setscheduler(process, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, os.sched_param(0))
    reset_boosted([process])
    assert os.sched_getscheduler(process) == os.SCHED_OTHER


def slack(process: int) -> str:
    return Path(f"/proc/{process}/timerslack_ns").read_text().strip()


def test_timer_slack_is_restored(process: int) -> None:
    Path(f"/proc/{process}/timerslack_ns").write_text("777")
    with timer_slack_restored(process), boosted(process):
        pass
    assert slack(process) == "777"


#: Boosts a process, and is killed.
KILLED = """
import os, sys, time
from sevhop.engine.realtime import Watchdog, boosted
watchdog = Watchdog.start()
watchdog.watch(int(sys.argv[1]))
print(watchdog._child.pid, flush=True)
sys.stdin.readline()
with boosted(int(sys.argv[1])):
    os.kill(os.getpid(), 9)
"""


def test_watchdog_resets_what_a_killed_command_has_boosted(process: int) -> None:
    Path(f"/proc/{process}/timerslack_ns").write_text("777")
    command = [sys.executable, "-c", KILLED, str(process)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        watchdog = int(child.stdout.readline())
        child.communicate("\n", timeout=30)
    assert child.returncode == -signal.SIGKILL
    wait_until(lambda: os.sched_getscheduler(process) == os.SCHED_OTHER, 10, "the priority is reset")
    wait_until(lambda: slack(process) == "777", 10, "the timer slack is restored")
    wait_until(lambda: not Path(f"/proc/{watchdog}").exists(), 10, "the watchdog exits")


def test_watchdog_exits_with_the_hop_and_changes_nothing(process: int) -> None:
    os.sched_setscheduler(process, os.SCHED_FIFO, os.sched_param(5))
    watchdog = Watchdog.start()
    watchdog.watch(process, 2**22 + 1)
    asyncio.run(watchdog.close())
    assert os.sched_getscheduler(process) == os.SCHED_FIFO
