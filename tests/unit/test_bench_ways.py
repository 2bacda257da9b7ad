"""The part of the benchmark that has upgrades: what is measured in turn, its tables, pings, and a busy host."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest
from bench import busy, domains, pinging
from bench.report import Report
from bench.runs import Run
from bench.ways import HOP, NO_TRANSIT, TRANSIT, Pinged, Row, Ways

from tests.support.guests.daemon import DomainGuest
from tests.support.guests.running import GuestFailed, wait_until


def upgrade(
    reported: float, gap: float, mode: str = TRANSIT, memory: int = 256, busy: bool = False, into: str = "10.0.13"
) -> Run:
    run = Run(mode, "domain", memory, gap, gap + 100, destination=into)
    return dataclasses.replace(run, reported_ms=reported, busy=busy)


RUNS = [
    upgrade(6.0, 9.0),
    upgrade(8.0, 10.0, into="7.2.22"),
    upgrade(10.0, 14.0),
    upgrade(7.0, 8.0, memory=8192),
    upgrade(24.0, 30.0, busy=True),
    upgrade(4.0, 5.0, HOP),
    upgrade(8.0, 9.0, HOP, busy=True),
    upgrade(200.0, 190.0, NO_TRANSIT),
    Run("save-restore", "domain", 256, 4000.0, 4100.0),
    Run("nothing", "domain", 256, 3.0, 4100.0),
    dataclasses.replace(upgrade(1.0, 1.0, HOP), machine="minimal"),
]
PINGS = [Pinged(TRANSIT, "domain", 256, 500, 4, 6.0), Pinged(TRANSIT, "domain", 256, 480, 6, 7.0)]


def rows(ways: Ways, machine: str = "domain") -> dict[str, Row]:
    return {row.title: row for row in ways.tables()[machine]}


def test_ways_are_rows_and_sizes_are_columns() -> None:
    text = "\n".join(Ways(RUNS, PINGS).markdown())
    assert "|  | 256 MB | 8 GB |" in text
    assert "| `sevhop upgrade`: the longer pause, n=1 to 3 | 8.0 (6.0 to 10.0) | 7.0 (7.0 to 7.0) |" in text
    assert "| `sevhop upgrade`: the same into 7.2, n=1 | 8.0 (8.0 to 8.0) |  |" in text
    assert "| `sevhop upgrade`: the guest's longest gap, n=1 to 3 | 10.0 (9.0 to 14.0) | 8.0" in text
    assert "| `sevhop upgrade`: pings lost, n=2 | 5.0 (4.0 to 6.0) |  |" in text
    assert "| nothing done: the guest's longest gap, n=1 | 3.0 (3.0 to 3.0) |  |" in text
    assert "save" not in text


def test_ways_are_compared_with_a_hop_of_the_same_guest_and_with_an_idle_host() -> None:
    found = rows(Ways(RUNS))
    assert found["`sevhop upgrade` to `sevhop hop`: the longer pause"].values == {256: 2.0}
    assert found["`sevhop upgrade` to `sevhop hop`, busy host: the longer pause"].values == {256: 3.0}
    assert found["`sevhop upgrade`, busy host to idle one: the longer pause"].values == {256: 3.0}
    assert found["`sevhop upgrade`, busy host to idle one: the guest's longest gap"].values == {256: 3.0}
    assert "`sevhop upgrade --no-transit`: the pause" in found
    assert "`sevhop upgrade --no-transit`, busy host: the pause" not in found


def test_report_has_ways_once_and_a_busy_host_apart() -> None:
    report = Report(RUNS, {}, pings=PINGS)
    found = json.loads(json.dumps(report.as_json()))
    assert found["ways"]["pings"][1]["lost"] == 6
    assert found["ways"]["tables"]["domain"][0]["256"]["median"] == 8.0
    assert found["ratios"]["upgrade/hop"] == {"256": 2.0}
    # The curve of a mode is that of one machine.
    assert [cell for cell in report.compared() if cell[1] == HOP] == [("minimal", HOP, 256)]
    assert "| domain, busy host | 256 MB | upgrade |" in report.markdown()
    assert Ways([]).markdown() == []


def test_upgrades_go_there_and_back_and_memory_is_saved_seldom() -> None:
    assert domains.turns([TRANSIT, NO_TRANSIT], 2) == [TRANSIT, TRANSIT, NO_TRANSIT, NO_TRANSIT] * 2
    assert domains.turns(domains.MODES, 4, save=True).count("save-restore") == 4
    assert domains.turns(domains.MODES, 1) == [TRANSIT, TRANSIT, NO_TRANSIT, NO_TRANSIT, "nothing"]


class Upgrading:
    """In place of a guest and its daemon: reports an upgrade."""

    name = "guest"

    def __init__(self, **report: object) -> None:
        self.daemon = self
        self.words: tuple[object, ...] = ()
        self._report: dict[str, Any] = {"outcome": "done", "downtimes_ms": [], "notes": [], **report}

    def upgrade(self, *words: object) -> dict[str, Any]:
        self.words = words
        return self._report


@pytest.mark.parametrize(("mode", "downtimes"), [(TRANSIT, [5.0, 7.0]), (NO_TRANSIT, [])])
def test_upgrade_must_be_done_in_the_way_that_is_measured(mode: str, downtimes: list[float]) -> None:
    guest = Upgrading(downtimes_ms=downtimes, downtime_ms=7.0)
    report = domains.upgrade(cast(DomainGuest, guest), mode, Path("/qemu"))
    assert domains.longest_pause(report) == 7.0
    assert ("--no-transit" in guest.words) == (mode == NO_TRANSIT)
    other = Upgrading(downtimes_ms=[] if downtimes else [5.0, 7.0], notes=["not by way of a transit: a TPM"])
    with pytest.raises(GuestFailed, match="the other way: not by way of a transit: a TPM"):
        domains.upgrade(cast(DomainGuest, other), mode, Path("/qemu"))
    failed = Upgrading(outcome="refused", reason="cannot hop", guest_state="running")
    with pytest.raises(GuestFailed, match="cannot hop; the guest: running"):
        domains.upgrade(cast(DomainGuest, failed), mode, Path("/qemu"))


def test_pings_that_are_not_answered_are_lost() -> None:
    """In a network of one's own, whose only interface is taken down for a while."""
    program = f'ip link set lo up && exec "{sys.executable}" "{pinging.__file__}" 127.0.0.1 2'
    process = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        if process.stdout.readline() != "answered\n":
            pytest.skip(f"no pings can be sent here: {process.communicate()[1]}")

        def set_interface(state: str) -> None:
            words = ["nsenter", "--net", "--target", str(process.pid), "ip", "link", "set", "lo", state]
            subprocess.run(words, check=True)

        set_interface("down")
        time.sleep(0.1)  # time for many pings
        set_interface("up")
        time.sleep(0.1)
        process.terminate()
        counted = json.loads(process.communicate(timeout=30)[0])
    finally:
        process.kill()
        process.communicate()
    assert 10 < counted["lost"] < counted["sent"] - 10


def test_busy_loops_end_with_the_context_and_with_their_parent() -> None:
    wanted = len(os.sched_getaffinity(0))
    assert loops(os.getpid()) == 0
    with busy.busy_loops(True):
        wait_until(lambda: loops(os.getpid()) == wanted, 30, "each processor has a loop")
    assert loops(os.getpid()) == 0
    with busy.busy_loops(False):
        assert loops(os.getpid()) == 0
    code = "from bench.busy import busy_loops\nwith busy_loops(True):\n    print(flush=True)\n    input()"
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": ":".join(sys.path)},
    )
    assert parent.stdout is not None
    parent.stdout.readline()
    wait_until(lambda: loops(parent.pid) == wanted, 30, "each processor has a loop")
    parent.kill()
    parent.communicate()
    wait_until(lambda: loops(parent.pid) == 0, 30, "the loops end")


def loops(parent: int) -> int:
    """How many of them a process has started."""
    found = 0
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        found += words[-2:] == [str(parent).encode(), b""] and b"getppid" in words[2]
    return found
