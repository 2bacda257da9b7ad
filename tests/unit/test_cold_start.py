"""A domain is started after its reboot, unless somebody has decided otherwise meanwhile."""

from __future__ import annotations

import asyncio
import syslog
from collections.abc import Callable
from typing import Any

import libvirt
import pytest
from sevhop.cli import cold_start
from sevhop.libvirt.connection import Connection
from sevhop.libvirt.daemon import DomainError, call
from sevhop.libvirt.domain import Domain

UUID = "11111111-2222-3333-4444-55555555550a"


class Raw:
    """libvirt's own object of a domain."""

    def __init__(self, state: int, reason: int, refusal: bool = False) -> None:
        self._state = [state, reason]
        self._refusal = refusal
        self.created = 0

    def name(self) -> str:
        return "web"

    def UUIDString(self) -> str:
        return UUID

    def state(self) -> list[int]:
        return self._state

    def create(self) -> int:
        if self._refusal:
            raise libvirt.libvirtError("domain is already running")
        self.created += 1
        return 0


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


def started(raw: Raw | None, monkeypatch: pytest.MonkeyPatch) -> str:
    """Start it; what was done."""
    daemon = Daemon(raw)

    async def connect(uri: str) -> Any:
        assert uri == "qemu:///system"
        return daemon

    monkeypatch.setattr(Connection, "open", connect)
    try:
        return asyncio.run(cold_start.start(UUID, "qemu:///system"))
    finally:
        assert daemon.closed


OFF = libvirt.VIR_DOMAIN_SHUTOFF


@pytest.mark.parametrize("reason", [libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN, libvirt.VIR_DOMAIN_SHUTOFF_CRASHED])
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
        (OFF, libvirt.VIR_DOMAIN_SHUTOFF_FAILED),
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


def test_refusal_of_libvirt_is_in_the_system_log(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[tuple[int, str]] = []
    monkeypatch.setattr(syslog, "syslog", lambda *line: lines.append(line))
    raw = Raw(OFF, libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN, refusal=True)
    with pytest.raises(DomainError):
        started(raw, monkeypatch)
    assert cold_start.main([UUID, "qemu:///system"]) == 1
    ((priority, text),) = lines
    assert priority == syslog.LOG_ERR
    assert text.startswith(f"cannot start domain {UUID} after its reboot: domain is already running; the domain is off")
