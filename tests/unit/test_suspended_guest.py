"""A guest that is suspended in the keeper: when it is not restored."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from sevhop.disks import unchanged_images
from sevhop.engine import suspended_guest
from sevhop.errors import RecoveryRequired
from sevhop.options import RecoverOptions
from sevhop.records.hop_record import HopRecord, Process, uptime

HOUR = 3600.0


def record(**fields: Any) -> HopRecord:
    """... of its hop."""
    return HopRecord(kind="domain", guest="web 1", context="none", running=True, source=Process(1 << 30, 1), **fields)


def test_guest_is_restored_at_any_age_if_somebody_asks() -> None:
    suspended_guest.verify_age(record(stopped_at=uptime() - 1000 * HOUR), RecoverOptions())


def test_guest_is_not_restored_unasked_when_it_is_old() -> None:
    options = RecoverOptions(unattended=True, max_age=HOUR)
    suspended_guest.verify_age(record(stopped_at=uptime() - HOUR / 2), options)
    with pytest.raises(RecoveryRequired, match="suspended for 26 h, and is not restored unasked after 60 min") as error:
        suspended_guest.verify_age(record(stopped_at=uptime() - 26 * HOUR), options)
    assert error.value.hint == "to resume it: sevhop recover 'web 1'; to give it up: sevhop recover 'web 1' --discard"


def test_age_is_that_of_the_hop_if_the_stop_was_not_recorded() -> None:
    with pytest.raises(RecoveryRequired):
        suspended_guest.verify_age(record(began=uptime() - 2 * HOUR), RecoverOptions(max_age=HOUR))


@pytest.mark.parametrize("opened", [False, True])
def test_guest_is_not_restored_on_images_that_others_have_written_to(tmp_path: Path, opened: bool) -> None:
    """A restore that has failed may have done so as well."""
    disk = tmp_path / "disk"
    disk.write_bytes(b"x")
    at = time.monotonic()
    found = record(images=unchanged_images.recorded([disk]), images_at=at)
    keeper = {"image": "/image", "restore_began": at + 1 if opened else at - 1}
    suspended_guest.verify_images(found, keeper)
    disk.write_bytes(b"xy")
    if opened:
        suspended_guest.verify_images(found, keeper)
        return
    with pytest.raises(RecoveryRequired, match="its size has changed") as error:
        suspended_guest.verify_images(found, keeper)
    assert "virsh restore /image" in error.value.hint


@pytest.mark.parametrize(("seconds", "text"), [(0.5, "0 s"), (119, "119 s"), (3600, "60 min"), (86400, "24 h")])
def test_time_span_is_readable(seconds: float, text: str) -> None:
    assert suspended_guest.readable(seconds) == text
