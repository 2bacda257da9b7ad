"""Scheduling that is copied from one thread to another."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from sevhop.process.scheduling import Roles, Thread, cgroup_directory, hand_over
from sevhop_qmp.errors import ProcessError, SevhopError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give priorities")


@pytest.fixture
def processes() -> Iterator[tuple[int, int]]:
    with subprocess.Popen(["sleep", "infinity"]) as one, subprocess.Popen(["sleep", "infinity"]) as other:
        yield one.pid, other.pid
        one.kill()
        other.kill()


@pytest.mark.parametrize(
    "changed",
    [
        {"nice": 7},
        {"nice": -5},
        {"affinity": frozenset({0})},
        {"io_priority": 0x4003},
        {"timer_slack": "4321"},
        {"policy": os.SCHED_FIFO, "priority": 3, "nice": 0, "timer_slack": ""},
        {"policy": os.SCHED_BATCH, "nice": 2},
        {"policy": os.SCHED_IDLE},
        {"policy": os.SCHED_RR, "priority": 1, "nice": 0, "flags": 1, "timer_slack": ""},
        {"policy": 6, "deadline": (1_000_000, 20_000_000, 40_000_000), "nice": 0, "timer_slack": ""},
    ],
)
def test_thread_gets_the_scheduling_of_another(processes: tuple[int, int], changed: dict[str, object]) -> None:
    one, other = processes
    wanted = Thread.of(one)._replace(**changed)  # type: ignore[arg-type]
    wanted.apply(one)
    assert wanted.differences(Thread.of(one)) == []
    assert hand_over(Roles({"first thread": one}, ()), Roles({"first thread": other}, ())) == []
    assert Thread.of(one).differences(Thread.of(other)) == []
    for name in ("policy", "priority", "nice", "affinity"):
        if name in changed:
            assert getattr(Thread.of(other), name) == changed[name]


def test_scheduling_that_cannot_be_applied_is_reported(
    processes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = processes
    os.setpriority(os.PRIO_PROCESS, one, 4)

    def forbidden(*_: object) -> None:
        raise PermissionError(1, "not allowed")

    monkeypatch.setattr(Thread, "apply", forbidden)
    found = hand_over(Roles({"first thread": one}, ()), Roles({"first thread": other}, ()))
    assert found == [f"first thread: nice is {os.nice(0)} in the new QEMU, 4 in the old one (not allowed)"]


def test_thread_that_has_exited_is_an_error() -> None:
    with pytest.raises(ProcessError, match=r"cannot read the scheduling of thread \d+: No such process"):
        Thread.of(2**22 + 1)


def test_cgroup_directory_is_found_by_its_mount() -> None:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        directory = cgroup_directory(controllers, path)
        assert str(os.getpid()) in (directory / "cgroup.procs").read_text().split()
    with pytest.raises(SevhopError, match="not mounted"):
        cgroup_directory("no-such-controller", "/")
