"""A domain is started after its reboot, unless somebody has decided otherwise meanwhile."""

from __future__ import annotations

import asyncio
import os
import syslog
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import libvirt
import pytest
from sevhop.cli import cold_start
from sevhop.libvirt.connection import Connection
from sevhop.libvirt.daemon import DomainError, call
from sevhop.libvirt.domain import Domain
from sevhop.records import run_directory

from .marks import redirect_marks

UUID = "11111111-2222-3333-4444-55555555550a"


class Raw:
    """libvirt's own object of a domain."""

    def __init__(self, state: int, reason: int, refusal: str = "", active: bool = False) -> None:
        self._state = [state, reason]
        self._refusal = refusal
        self._active = active
        self.created = 0

    def name(self) -> str:
        return "web"

    def UUIDString(self) -> str:
        return UUID

    def state(self) -> list[int]:
        return self._state

    def create(self) -> int:
        if self._refusal:
            raise libvirt.libvirtError(self._refusal)
        self.created += 1
        return 0

    def isActive(self) -> bool:
        return self._active


class Daemon:
    """A connection to it."""

    def __init__(self, raw: Raw | None) -> None:
        self._raw = raw
        self.closed = False

    async def domain_with(self, uuid: str) -> Domain | None:
        assert uuid == UUID
        return Domain(self, self._raw) if self._raw else None  # type: ignore[arg-type]

    async def call(self, function: Callable[..., Any], **_: float) -> Any:
        return await call(function)

    def close(self) -> None:
        self.closed = True


def connect(raw: Raw | None, monkeypatch: pytest.MonkeyPatch) -> Daemon:
    """Have the program connect to a daemon with this domain, which is in no hop."""
    daemon = Daemon(raw)

    async def open_(uri: str) -> Any:
        assert uri == "qemu:///system"
        return daemon

    monkeypatch.setattr(Connection, "open", open_)
    monkeypatch.setattr(run_directory, "in_hop", lambda uuid: False)
    return daemon


def started(raw: Raw | None, monkeypatch: pytest.MonkeyPatch) -> str:
    """Start it; what was done."""
    daemon = connect(raw, monkeypatch)
    try:
        return asyncio.run(cold_start.start(UUID, "qemu:///system"))
    finally:
        assert daemon.closed


OFF = libvirt.VIR_DOMAIN_SHUTOFF


@pytest.mark.parametrize(
    "reason",
    [libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN, libvirt.VIR_DOMAIN_SHUTOFF_CRASHED, libvirt.VIR_DOMAIN_SHUTOFF_FAILED],
)
def test_domain_that_stopped_on_its_own_is_started(reason: int, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = Raw(OFF, reason)
    assert started(raw, monkeypatch) == "domain web has rebooted, which was a shutdown after its hop: it is started"
    assert raw.created == 1


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (OFF, libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED),
        (OFF, libvirt.VIR_DOMAIN_SHUTOFF_SAVED),
        (OFF, libvirt.VIR_DOMAIN_SHUTOFF_MIGRATED),
        (OFF, libvirt.VIR_DOMAIN_SHUTOFF_FROM_SNAPSHOT),
        (libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_RUNNING_BOOTED),
        (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_USER),
    ],
)
def test_domain_is_not_started_against_a_clients_will(state: int, reason: int, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = Raw(state, reason)
    assert started(raw, monkeypatch).endswith("another client has changed its state: it is not started")
    assert raw.created == 0


def test_transient_domain_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "has rebooted and is gone" in started(None, monkeypatch)


def logged(raw: Raw | None, monkeypatch: pytest.MonkeyPatch, status: int) -> tuple[int, str]:
    """Run the program, which exits with this status; priority and text of what it logs."""
    lines: list[tuple[int, str]] = []
    monkeypatch.setattr(syslog, "syslog", lambda *line: lines.append(line))
    connect(raw, monkeypatch)
    assert cold_start.main([UUID, "qemu:///system"]) == status
    (line,) = lines
    return line


def test_refusal_of_libvirt_is_in_the_system_log(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = Raw(OFF, libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN, refusal="cannot open the disk")
    assert logged(raw, monkeypatch, 1) == (
        syslog.LOG_ERR,
        f"cannot start domain {UUID} after its reboot: cannot open the disk; the domain is off; run: virsh start web",
    )


def test_domain_that_somebody_else_has_just_started_is_not_reported_as_off(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = Raw(OFF, libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN, refusal="domain is already running", active=True)
    priority, text = logged(raw, monkeypatch, 0)
    assert (priority, text.endswith("it is active again")) == (syslog.LOG_NOTICE, True)


def test_state_is_not_claimed_if_it_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(uri: str) -> Any:
        raise DomainError(f"cannot connect to {uri}")

    connect(None, monkeypatch)
    lines: list[str] = []
    monkeypatch.setattr(syslog, "syslog", lambda priority, text: lines.append(text))
    monkeypatch.setattr(Connection, "open", refuse)
    assert cold_start.main([UUID, "qemu:///system"]) == 1
    assert lines == [
        f"cannot start domain {UUID} after its reboot: cannot connect to qemu:///system; see virsh list --all"
    ]


def test_domain_is_started_when_its_hop_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = Raw(OFF, libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN)
    hops = iter([True, True, False])
    seen: list[int] = []

    def in_hop(uuid: str) -> bool:
        assert uuid == UUID
        seen.append(raw.created)
        return next(hops)

    connect(raw, monkeypatch)
    monkeypatch.setattr(cold_start, "_POLL", 0)
    monkeypatch.setattr(run_directory, "in_hop", in_hop)
    assert asyncio.run(cold_start.start(UUID, "qemu:///system")).endswith("it is started")
    assert (seen, raw.created) == ([0, 0, 0], 1)


def test_domain_is_not_started_while_its_hop_is_in_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its guest may be suspended in the keeper."""
    raw = Raw(OFF, libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN)
    monkeypatch.setattr(cold_start, "_HOP_TIMEOUT", 0)
    connect(raw, monkeypatch)
    monkeypatch.setattr(run_directory, "in_hop", lambda uuid: True)
    monkeypatch.setattr(syslog, "syslog", lambda *line: None)
    assert cold_start.main([UUID, "qemu:///system"]) == 1
    assert raw.created == 0


def test_hop_is_in_progress_as_long_as_its_keeper_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that a killed keeper has left is waited for by nobody."""
    with tempfile.TemporaryDirectory() as short:
        redirect_marks(Path(short), monkeypatch)
        assert not run_directory.in_hop(UUID)
        directory = run_directory.claim("web", UUID)
        assert not run_directory.in_hop(UUID)
        with run_directory.listening(directory / "control", os.geteuid()):
            assert run_directory.in_hop(UUID.upper())
            assert not run_directory.in_hop(UUID.replace("5", "6"))
        assert not run_directory.in_hop(UUID)


def test_unexpected_error_is_in_the_system_log(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[str] = []

    async def fail(*_: object) -> str:
        raise KeyError("missing")

    monkeypatch.setattr(cold_start, "start", fail)
    monkeypatch.setattr("syslog.syslog", lambda _, text: logged.append(text))
    assert cold_start.main([UUID, "qemu:///system"]) == 1
    (text,) = logged
    assert f"cannot start domain {UUID} after its reboot: unexpected KeyError" in text
    assert f"run: virsh start {UUID}" in text


def test_wrong_usage_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert cold_start.main([UUID]) == 2
    assert capsys.readouterr().err.startswith("usage: ")
