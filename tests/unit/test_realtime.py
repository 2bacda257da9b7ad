"""Who goes before others while a guest stands still, and not longer."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sevhop.engine.realtime import Watch, keeping_timer_slack, urgent
from sevhop.engine.realtime_reset import relax

from tests.support.guests.running import wait_until

URGENT = os.SCHED_RR | os.SCHED_RESET_ON_FORK


@pytest.fixture
def process() -> Iterator[int]:
    with subprocess.Popen(["sleep", "infinity"]) as process:
        yield process.pid
        process.kill()


def test_for_a_while(process: int) -> None:
    with urgent(0, process):
        assert [os.sched_getscheduler(thread) for thread in (0, process)] == [URGENT, URGENT]
        child = subprocess.run(["chrt", "--pid", "0"], capture_output=True, text=True, check=True)
        assert "SCHED_OTHER" in child.stdout
    assert [os.sched_getscheduler(thread) for thread in (0, process)] == [os.SCHED_OTHER, os.SCHED_OTHER]


def test_also_after_a_failure(process: int) -> None:
    with pytest.raises(ZeroDivisionError), urgent(0, process):
        raise ZeroDivisionError
    assert [os.sched_getscheduler(thread) for thread in (0, process)] == [os.SCHED_OTHER, os.SCHED_OTHER]


def test_who_has_a_policy_of_its_own_keeps_it(process: int) -> None:
    os.sched_setscheduler(process, os.SCHED_FIFO, os.sched_param(5))
    with urgent(0, process):
        assert os.sched_getscheduler(process) == os.SCHED_FIFO
    relax([process])
    assert (os.sched_getscheduler(process), os.sched_getparam(process).sched_priority) == (os.SCHED_FIFO, 5)


def test_one_goes_before_the_others(process: int) -> None:
    with urgent(process, first=True), urgent(0, process):
        assert [os.sched_getparam(thread).sched_priority for thread in (0, process)] == [1, 2]


@pytest.mark.parametrize("priority", [1, 2])
def test_what_a_killed_command_has_left_is_taken_back(process: int, priority: int) -> None:
    os.sched_setscheduler(process, URGENT, os.sched_param(priority))
    relax([process])
    assert os.sched_getscheduler(process) == os.SCHED_OTHER


def test_somebody_who_has_ended() -> None:
    with urgent(0, 2**22 + 1):
        assert os.sched_getscheduler(0) == URGENT
    relax([2**22 + 1])
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_a_host_may_forbid_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", forbidden)
    with urgent(0):
        pass
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_what_the_library_could_not_take_back_is_taken_back(process: int) -> None:
    os.sched_setscheduler(process, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, os.sched_param(0))
    relax([process])
    assert os.sched_getscheduler(process) == os.SCHED_OTHER


def slack(process: int) -> str:
    return Path(f"/proc/{process}/timerslack_ns").read_text().strip()


def test_timer_slack_is_kept(process: int) -> None:
    Path(f"/proc/{process}/timerslack_ns").write_text("777")
    with keeping_timer_slack(process), urgent(process):
        pass
    assert slack(process) == "777"


#: Lends a priority, and is killed.
KILLED = """
import os, sys, time
from sevhop.urgency import Watch, urgent
watch = Watch.start()
watch.over(int(sys.argv[1]))
print(watch._child.pid, flush=True)
sys.stdin.readline()
with urgent(int(sys.argv[1])):
    os.kill(os.getpid(), 9)
"""


def test_watch_takes_back_what_a_killed_command_has_lent(process: int) -> None:
    Path(f"/proc/{process}/timerslack_ns").write_text("777")
    command = [sys.executable, "-c", KILLED, str(process)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        watch = int(child.stdout.readline())
        child.communicate("\n", timeout=30)
    assert child.returncode == -signal.SIGKILL
    wait_until(lambda: os.sched_getscheduler(process) == os.SCHED_OTHER, 10, "the priority is taken back")
    wait_until(lambda: slack(process) == "777", 10, "and the timer slack is given back")
    wait_until(lambda: not Path(f"/proc/{watch}").exists(), 10, "it ends")


def test_watch_ends_with_the_hop_and_changes_nothing(process: int) -> None:
    os.sched_setscheduler(process, os.SCHED_FIFO, os.sched_param(5))
    watch = Watch.start()
    watch.over(process, 2**22 + 1)
    asyncio.run(watch.close())
    assert os.sched_getscheduler(process) == os.SCHED_FIFO
