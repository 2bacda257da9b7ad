"""Reboot marks in a directory of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from sevhop.records import reboot_mark, run_directory


def redirect_marks(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have what is in ``/run/sevhop`` in this directory. :return: where the marks are."""
    run = directory / "sevhop"
    monkeypatch.setattr(run_directory, "RUN", run)
    monkeypatch.setattr(run_directory, "DOMAINS", run / "domains")
    for module in (run_directory, reboot_mark):
        monkeypatch.setattr(module, "REBOOTS", run / "reboot")
    return run / "reboot"
