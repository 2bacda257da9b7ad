"""What a report is for people."""

from __future__ import annotations

from pathlib import Path

import pytest
from sevhop.report import Report

IMAGE = Path("/run/sevhop/0/image")


@pytest.mark.parametrize(
    ("in_transit", "downtime_ms", "line"),
    [
        (True, 5.0, "web 1: the guest runs in the transit; to complete the upgrade: "),
        (True, None, "web 1: the guest is paused in the transit; to complete the upgrade: "),
        (False, None, "web 1: the guest is suspended in the keeper; to resume it: "),
    ],
)
def test_prepared_upgrade_has_the_command_that_leaves_nothing_behind_first(
    in_transit: bool, downtime_ms: float | None, line: str
) -> None:
    """After virsh restore there is still the journal."""
    report = Report(guest="web 1", kind="domain", image=IMAGE, in_transit=in_transit, outcome="prepared")
    report.downtime_ms = downtime_ms
    assert str(report) == f"{line}sevhop recover 'web 1', or virsh restore {IMAGE}"
    assert report.as_json()["hint"] == f"run: sevhop recover 'web 1', or virsh restore {IMAGE}"
