"""The host shuts down while a guest is in the transit: its keeper has it shut down."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from sevhop.keeper.tasks import Tasks
from sevhop.keeper.transit_state import TransitState
from sevhop.process import host_shutdown, systemd
from sevhop.transit_keeper.server import TransitServer
from sevhop_qmp.errors import MonitorError


class Transit:
    """A transit, its monitor, and the keeper's account of it."""

    def __init__(self, *, running: bool = True, answers: bool = True) -> None:
        self.state = TransitState.TRANSIT
        self.record = self
        self.asked: list[str] = []
        self._running = running
        self._answers = answers

    async def connected(self) -> Transit:
        if not self._answers:
            raise MonitorError("gone")
        return self

    async def execute(self, command: str) -> dict[str, object]:
        self.asked.append(command)
        return {"running": self._running}


def terminated(transit: Transit, times: int = 1) -> bool:
    """Send SIGTERM to its keeper. :return: whether the keeper ends."""

    async def run() -> bool:
        server: Any = TransitServer.__new__(TransitServer)
        server._ledger = server._watch = transit
        server._tasks, server._host_stops, server.end = Tasks(), False, asyncio.Event()
        for _ in range(times):
            server.terminate()
        while server._tasks._running:
            await asyncio.sleep(0)
        return bool(server.end.is_set())

    return asyncio.run(run())


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_shutdown, "in_progress", lambda: True)


@pytest.mark.usefixtures("stopping")
def test_guest_in_the_transit_is_shut_down_once_with_the_host() -> None:
    transit = Transit()
    assert not terminated(transit, times=2)
    assert transit.asked == ["query-status", "system_powerdown"]


@pytest.mark.usefixtures("stopping")
@pytest.mark.parametrize("transit", [Transit(running=False), Transit(answers=False)], ids=["paused", "hangs"])
def test_shutdown_does_not_wait_for_a_guest_that_cannot_shut_down(transit: Transit) -> None:
    assert terminated(transit)
    assert "system_powerdown" not in transit.asked


def test_signal_alone_shuts_no_guest_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_shutdown, "in_progress", lambda: False)
    transit = Transit()
    assert not terminated(transit)
    assert transit.asked == []


@pytest.mark.parametrize(("says", "expected"), [("stopping", True), ("running", False), ("degraded", False)])
def test_systemd_knows_whether_the_host_shuts_down(
    says: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "systemctl"
    program.write_text(f'#!/bin/sh\n[ "$*" = is-system-running ] && echo {says}\nexit 1\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(systemd, "BOOTED", tmp_path)
    assert host_shutdown.in_progress() is expected
    monkeypatch.setattr(systemd, "BOOTED", tmp_path / "missing")
    assert not host_shutdown.in_progress()


def test_systemd_is_asked_once_more_if_it_kills_who_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keeper's scope is being stopped: what the keeper starts then may be killed with it."""
    program = tmp_path / "systemctl"
    program.write_text(f"#!/bin/sh\nmkdir {tmp_path}/asked 2>/dev/null && kill $$\necho stopping\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(systemd, "BOOTED", tmp_path)
    assert host_shutdown.in_progress()
    assert (tmp_path / "asked").is_dir()
