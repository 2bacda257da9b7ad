"""Recovery of a guest whose transit has exited."""

from __future__ import annotations

import asyncio
import subprocess
from typing import Any, cast

import pytest
from sevhop.engine import transit_recovery
from sevhop.engine.transit_recovery import TransitRecovery
from sevhop.options import RecoverOptions


class Record:
    """Of a hop, as far as it matters here."""

    stopped_ms = 0.0


def stays(pid: int | None) -> bool:
    recovery = TransitRecovery(cast(Any, Record()), cast(Any, None), None, None, RecoverOptions())
    return asyncio.run(recovery._stays(pid))


def test_destination_that_is_about_to_exit_does_not_have_the_guest() -> None:
    """libvirt has its domain as active for some time: the guest would be reported as running."""
    with subprocess.Popen(["sleep", "0.3"]) as ending:
        assert not stays(ending.pid)
    assert not stays(ending.pid)
    assert not stays(None)


def test_destination_that_goes_on_has_the_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transit_recovery, "_EXIT", 0.2)
    with subprocess.Popen(["sleep", "60"]) as running:
        assert stays(running.pid)
        running.kill()
