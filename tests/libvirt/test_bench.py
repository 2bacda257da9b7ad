"""One round of the benchmark: the guest arrives with every method, its downtime is measured, and there are ratios."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from bench.domains import SAVE_RESTORE, UPGRADE
from bench.report import PAIRS
from bench.standalone import MODES

from tests.support.guests.build import ROOT
from tests.support.guests.daemon import Daemon

from ..conftest import NOTED


def test_quick_run_measures_every_method(
    daemon: Daemon, old: Path, new: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """The fixture daemon skips the test where the benchmark cannot start one."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.cli", "--quick", "--json", "--images", tmp_path, "--output", tmp_path / "report"],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["failures"] == []
    assert {row["mode"] for row in report["summary"]} == {*MODES, UPGRADE, SAVE_RESTORE}
    assert all(row["downtime_ms"]["low"] > 0 for row in report["summary"])
    assert all(run["source"] == run["destination"] for run in report["runs"] if run["machine"] == "minimal")
    assert list(report["ratios"]) == ["/".join(pair) for pair in PAIRS]
    assert report["foreign_hook_ms"]["median"] > 0
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["bench.json", "bench.md", "bench.svg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report"]
    for pair, ratios in report["ratios"].items():
        ratio = ", ".join(f"{value:.3f} with {size} MB" for size, value in ratios.items())
        record_property(
            NOTED, f"downtime of {pair.replace('/', ' to that of ')}: {ratio}; one run each, on this machine"
        )
