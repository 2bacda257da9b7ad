"""The benchmark: its arithmetic, its tables and diagram, and that it measures a downtime."""

from __future__ import annotations

import dataclasses
import itertools
import json
import mmap
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from bench import downtime
from bench.picture import svg
from bench.report import Report
from bench.runs import Failed, Outcome, Run, Spread
from bench.usage import Usage, Used
from bench.usage import counting as count

from tests.support.guests import counter
from tests.support.guests.running import GuestFailed


def run(mode: str, memory: int, downtime_ms: float, machine: str = "minimal", **phases: float) -> Run:
    return Run(mode, machine, memory, downtime_ms, downtime_ms + 100, phases, "7.2.22", "10.0.13")


REPORT = Report(
    [
        run("hop", 256, 4.0, stop=1.0, save=2.0, finish=70.0),
        run("precopy", 256, 100.0),
        run("hop", 256, 6.0, stop=3.0, save=4.0),
        run("hop", 256, 50.0, stop=2.0, save=40.0),
        run("precopy", 256, 300.0),
        run("hop", 1024, 9.0),
        run("hop", 1024, 99.0, machine="rich"),
        run("file", 1024, 900.0),
        run("upgrade-no-transit", 256, 200.0, machine="domain", restore=180.0),
        run("save-restore", 256, 4000.0, machine="domain"),
    ],
    {"date": "today"},
    [2.0, 3.0, 4.0],
)


def test_spread_has_median_and_extremes() -> None:
    assert Spread.of([3.0, 1.0, 2.0, 10.0]) == Spread(2.5, 1.0, 10.0, 4)
    assert str(Spread.of([3.04, 150.4])) == "76.7 (3.0 to 150)"
    with pytest.raises(ValueError, match="nothing"):
        Spread.of([])


def test_ratios_are_of_medians_and_of_measured_pairs() -> None:
    assert REPORT.ratios() == {
        "hop/precopy": {"256": 6.0 / 200.0},
        "hop/file": {"1024": 0.01},
        "upgrade-no-transit/save-restore": {"256": 0.05},
    }


def test_growth_compares_most_memory_with_least() -> None:
    assert REPORT.growth() == {"hop": 9.0 / 6.0}


def test_phases_are_medians_in_order() -> None:
    assert list(REPORT.phases(("minimal", "hop", 256)).items()) == [("stop", 2.0), ("save", 4.0), ("finish", 70.0)]
    assert REPORT.phases(("minimal", "precopy", 256)) == {}


def test_json_has_ratios_runs_and_summary() -> None:
    report = json.loads(json.dumps(REPORT.as_json()))
    assert report["ratios"] == REPORT.ratios()
    assert report["foreign_hook_ms"]["median"] == 3.0
    assert len(report["runs"]) == 10
    first = report["summary"][0]
    assert (first["mode"], first["machine"], first["memory_mib"]) == ("hop", "minimal", 256)
    assert first["downtime_ms"] == {"median": 6.0, "low": 4.0, "high": 50.0, "count": 3}


def test_tables_have_medians_and_ratios() -> None:
    text = REPORT.markdown()
    assert "| minimal | 256 MB | hop | 7.2 → 10.0 | 6.0 (4.0 to 50.0) | 0.0 | 106 |  |  | 3 |" in text
    assert "| hop/precopy | 0.0300 |  |" in text
    assert "rich" not in text.partition("sevhop to the other")[2]  # nothing to compare with
    assert "hop 1.50" in text
    assert "| minimal | 256 MB | hop | stop 2.0, save 4.0, finish 70.0 |" in text


def test_run_derives_downtime_and_usage_from_the_measurements() -> None:
    outcome = Outcome((2_500_000_000, 2_600_000_000), began=2.0, ended=3.0, phases={"save": 5.0})
    seen = Run.of(("hop", "rich", 256), outcome, None, "7.2.22", "10.0.13")
    assert (seen.downtime_ms, seen.prepare_ms, seen.total_ms) == (100.0, 500.0, 1000.0)
    assert (seen.cpu_ms, seen.memory_mib_more) == (None, None)
    # For 1,100 ms less the downtime one processor was the guest's.
    counted = Run.of(("hop", "rich", 256), outcome, Used(1100.0, 1250.0, 30.0), "7.2.22", "10.0.13")
    assert (counted.cpu_ms, counted.memory_mib_more) == (250.0, 30.0)
    text = Report([counted, dataclasses.replace(counted, mode="precopy", downtime_ms=200.0)], {}).markdown()
    assert "| rich | 256 MB | hop | 7.2 → 10.0 | 100 (100 to 100) | 500 | 1000 | 250 | 30.0 | 1 |" in text
    assert "rich machine.\n\n|  | 256 MB |\n| --- | --- |\n| hop/precopy | 0.50 |" in text


def test_usage_counts_child_processes() -> None:
    try:
        with Usage() as usage:
            with count(usage) as used:
                code = "import time; full = b'x' * (64 << 20)\nwhile time.process_time() < 0.3: pass"
                subprocess.run([sys.executable, "-c", code], check=True)
            assert used is not None
            assert used.cpu_ms >= 300
            assert used.elapsed_ms >= 300
            assert used.memory_mib >= 64
            with count(usage) as nothing:
                pass
            assert nothing is not None
            assert nothing.memory_mib < 32
    except OSError as err:
        pytest.skip(f"no cgroup of our own: {err}")
    assert "sevhop-bench" not in Path("/proc/self/cgroup").read_text()
    assert not list(Path("/sys/fs/cgroup").glob(f"**/sevhop-bench-{os.getpid()}"))


def test_usage_is_none_without_cgroups() -> None:
    with count(None) as used:
        assert used is None


def test_report_has_runs_that_failed() -> None:
    failed = dataclasses.replace(REPORT, failures=[Failed("file", "rich", 1024, "no space")])
    assert "rich file, 1 GB, did not arrive: no space" in failed.markdown()
    assert failed.as_json()["failures"] == [
        {"mode": "file", "machine": "rich", "memory_mib": 1024, "reason": "no space"}
    ]


def test_empty_report_is_valid() -> None:
    empty = dataclasses.replace(REPORT, runs=[run("hop", 256, 0.0)], foreign_hook_ms=[])
    assert empty.ratios() == {}
    assert empty.as_json()["foreign_hook_ms"] is None
    ElementTree.fromstring(svg(empty))
    ElementTree.fromstring(svg(dataclasses.replace(empty, runs=[])))


def test_diagram_has_every_mode() -> None:
    drawn = ElementTree.fromstring(svg(REPORT))
    texts = {element.text for element in drawn.iter() if element.tag.endswith("}text")}
    assert {"hop", "precopy", "file", "upgrade-no-transit", "save-restore", "256 MB", "1 GB"} <= texts
    assert {"hop, 256 MB", "upgrade-no-transit, 256 MB", "restore 180"} <= texts
    assert not any(text and text.startswith("finish") for text in texts)  # a hop finishes after its downtime


def test_labels_of_curves_do_not_overlap() -> None:
    modes = ("hop", "cpr-transfer", "x-ignore-shared", "precopy")
    report = dataclasses.replace(REPORT, runs=[run(mode, size, 5.0) for mode in modes for size in (256, 1024)])
    drawn = ElementTree.fromstring(svg(report))
    heights = sorted(float(element.attrib["y"]) for element in drawn.iter() if element.text in modes)
    assert len(heights) == 4
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 12


class Counting:
    """A guest's memory in which a number grows while :attr:`running` is set."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("memory-backend-memfd")
        os.ftruncate(self.fd, counter.COUNTER + mmap.PAGESIZE)
        self.path = Path(f"/proc/{os.getpid()}/fd/{self.fd}")
        self.running = threading.Event()
        self._ended = False
        self._map = mmap.mmap(self.fd, 0)
        self._thread = threading.Thread(target=self._count)
        self._thread.start()

    def _count(self) -> None:
        value = 0
        while not self._ended:
            if not self.running.wait(0.01):
                continue
            value += 1
            struct.pack_into("<Q", self._map, counter.COUNTER, value)
            time.sleep(0)

    def end(self) -> None:
        self._ended = True
        self._thread.join()
        self._map.close()
        os.close(self.fd)


@pytest.fixture
def counting() -> Iterator[Counting]:
    counting = Counting()
    yield counting
    counting.end()


def test_sampler_measures_a_downtime(counting: Counting) -> None:
    with downtime.Sampler(counting.path) as sampler:
        counting.running.set()
        sampler.wait()
        counting.running.clear()
        stopped = time.monotonic_ns()
        time.sleep(0.3)
        resumed = time.monotonic_ns()
        counting.running.set()
        sampler.see_growth()
        sampler.stop()
    assert 0 < sampler.began < stopped
    # The gap may be longer, if the thread had no processor before or after; never shorter.
    assert any(start <= resumed - 200_000_000 and end >= resumed for start, end in sampler.gaps)
    assert (sampler.longest[1] - sampler.longest[0]) >= 200_000_000
    assert sampler.last >= resumed


def test_sampler_ignores_a_single_step(counting: Counting) -> None:
    with downtime.Sampler(counting.path) as sampler:
        os.pwrite(counting.fd, b"\1", counter.COUNTER)
        time.sleep(0.05)  # time for many samples
        loaded = time.monotonic_ns()
        counting.running.set()
        sampler.wait()
        sampler.stop()
    assert sampler.began > loaded


def test_memory_of_a_process_is_found_and_touched() -> None:
    assert downtime.memory_of(os.getpid()) is None
    fd = os.memfd_create("memory-backend-memfd")
    os.ftruncate(fd, 16 << 20)
    other = os.memfd_create("memory-backend-memfd")
    try:
        memory = downtime.memory_of(os.getpid())
        assert memory == Path(f"/proc/{os.getpid()}/fd/{fd}")
        downtime.touch(memory)
        pages = [os.pread(fd, 4096, at) for at in range(0, 16 << 20, 4096)]
        own = counter.PATTERN_END // 4096
        assert not any(any(page) for page in pages[:own])
        assert len(set(pages[own:])) == len(pages) - own
    finally:
        os.close(fd)
        os.close(other)


def test_memory_of_a_missing_process_is_none(tmp_path: Path) -> None:
    assert downtime.memory_of(2**22 + 1) is None
    (tmp_path / "empty").touch()
    with downtime.Sampler(tmp_path / "empty") as sampler, pytest.raises(GuestFailed):
        sampler.wait()
