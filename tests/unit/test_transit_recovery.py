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
    uuid = "00000000-0000-0000-0000-000000000000"


def has_the_guest(pid: int | None) -> bool:
    recovery = TransitRecovery(cast(Any, Record()), cast(Any, None), None, None, RecoverOptions())
    return asyncio.run(recovery._has_the_guest(pid))


def test_destination_that_is_about_to_exit_does_not_have_the_guest() -> None:
    """libvirt has its domain as active for some time: the guest would be reported as running."""
    with subprocess.Popen(["sleep", "0.3"]) as ending:
        assert not has_the_guest(ending.pid)
    assert not has_the_guest(ending.pid)
    assert not has_the_guest(None)


def test_destination_that_goes_on_has_the_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transit_recovery, "_EXIT", 0.2)
    with subprocess.Popen(["sleep", "60"]) as running:
        assert has_the_guest(running.pid)
        running.kill()
