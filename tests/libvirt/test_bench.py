"""One round of the benchmark: the guest arrives with every method, its downtime is measured, and there are ratios."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench import domains, standalone
from bench.report import PAIRS
from bench.ways import HOP, NOTHING, TRANSIT

from tests.support.guests import linux
from tests.support.guests.build import ROOT, Unavailable
from tests.support.guests.daemon import Daemon

from ..conftest import NOTED


def measured(tmp_path: Path, *words: str) -> dict[str, Any]:
    """Run the benchmark. What it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.cli", *words, "--json", "--images", tmp_path, "--output", tmp_path / "report"],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["failures"] == []
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["bench.json", "bench.md", "bench.svg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report"]
    return report


def test_quick_run_compares_hop_and_upgrade(
    daemon: Daemon, old: Path, new: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """The fixture daemon skips the test where the benchmark cannot start one."""
    modes = (HOP, "cpr-transfer", TRANSIT)
    report = measured(tmp_path, "--quick", "--modes", ",".join(modes))
    assert {row["mode"] for row in report["summary"]} == set(modes)
    assert set(report["ratios"]) == {f"{HOP}/cpr-transfer", f"{TRANSIT}/{HOP}"}
    assert_plausible(report)
    for pair, ratios in report["ratios"].items():
        ratio = ", ".join(f"{value:.3f} with {size} MB" for size, value in ratios.items())
        record_property(
            NOTED, f"downtime of {pair.replace('/', ' to that of ')}: {ratio}; one run each, on this machine"
        )


@pytest.mark.long
def test_quick_run_measures_every_method(daemon: Daemon, old: Path, new: Path, tmp_path: Path) -> None:
    report = measured(tmp_path, "--quick")
    assert {row["mode"] for row in report["summary"]} == {*standalone.MODES, *domains.MODES}
    assert list(report["ratios"]) == ["/".join(pair) for pair in PAIRS]
    assert_plausible(report)


def assert_plausible(report: dict[str, Any]) -> None:
    """The guest was stopped for a moment by every method that stops it, and arrived."""
    assert all(row["downtime_ms"]["low"] > 0 for row in report["summary"] if row["mode"] != NOTHING)
    assert all(run["source"] == run["destination"] for run in report["runs"] if run["machine"] == "minimal")
    assert report["foreign_hook_ms"]["median"] > 0
    pauses = {row["title"]: row["256"] for row in report["ways"]["tables"]["domain"]}
    assert pauses["`sevhop upgrade`: the longer pause"]["count"] == 2
    assert pauses["`sevhop hop`: the pause"]["median"] > 0


@pytest.mark.long
def test_upgrades_are_measured_on_a_busy_host_and_with_pings(
    daemon: Daemon, old: Path, new: Path, tmp_path: Path
) -> None:
    try:
        linux.images()
    except Unavailable as err:
        pytest.skip(f"no Linux guest: {err}")
    words = ["--only", "busy,pings", "--modes", TRANSIT, "--machines", "rich", "--sizes", "256", "--rounds", "1"]
    report = measured(tmp_path, *words)
    assert [(run["mode"], run["busy"]) for run in report["runs"]] == [(TRANSIT, True)] * 2
    assert all(one["sent"] > one["lost"] for one in report["ways"]["pings"])
    assert len(report["ways"]["pings"]) == 2
