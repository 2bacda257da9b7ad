"""The clock of a guest that was stopped for long."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sevhop.engine import guest_clock
from sevhop.engine.recovery_result import RecoveredGuest, RecoveryOutcome
from sevhop.libvirt.daemon import DomainError, DomainTimeout
from sevhop.report import Clock, Report


class Agent:
    """
    A daemon with one domain, and the agent of its guest.

    :ivar connected: what libvirt reports, one answer after the other.
    """

    def __init__(self, *connected: bool | None, error: DomainError | None = None, running: bool = True) -> None:
        self.connected = list(connected)
        self.error = error
        self.runs = running
        self.set = 0

    async def reconnect(self) -> bool:
        return False

    async def domain_with(self, uuid: str) -> Agent:
        return self

    async def running(self) -> bool:
        return self.runs

    async def has_agent(self) -> bool | None:
        return self.connected.pop(0) if len(self.connected) > 1 else self.connected[0]

    async def synchronize_clock(self, timeout: float) -> None:
        self.set += 1
        if self.error is not None:
            raise self.error


def settled(agent: Agent, stopped_ms: float | None = 3200.0, *, set_time: bool = True) -> Clock | None:
    """What has become of the clock."""
    connection: Any = agent
    return asyncio.run(guest_clock.settle(connection, "uuid", stopped_ms, set_time=set_time))


def test_agent_sets_the_clock_after_a_long_stop() -> None:
    agent = Agent(True)
    assert (settled(agent), agent.set) == (Clock(True), 1)


@pytest.mark.parametrize("stopped_ms", [None, 0.0, 999.0])
def test_clock_of_a_guest_that_was_not_stopped_for_long_is_left_alone(stopped_ms: float | None) -> None:
    agent = Agent(True)
    assert (settled(agent, stopped_ms), agent.set) == (None, 0)


def test_agent_has_time_to_connect_to_the_new_qemu() -> None:
    assert settled(Agent(False, False, True)) == Clock(True)


@pytest.mark.parametrize(
    ("agent", "reason"),
    [
        (Agent(None), "it has no guest agent"),
        (Agent(False), "its guest agent is not connected"),
        (Agent(True, error=DomainError("no such command")), "no such command"),
        (Agent(True, error=DomainTimeout("libvirt did not answer within 5 s")), "libvirt did not answer within 5 s"),
    ],
)
def test_failure_is_a_reason_and_no_error(agent: Agent, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_clock, "_CONNECTS", 0.1)
    assert settled(agent) == Clock(False, reason)


def test_clock_is_left_alone_if_that_is_asked_for() -> None:
    agent = Agent(True)
    assert (settled(agent, set_time=False), agent.set) == (Clock(False, "--no-set-time"), 0)


def test_clock_of_a_guest_that_libvirt_does_not_run_is_left_alone() -> None:
    """It is paused, or runs in the transit."""
    agent = Agent(True, running=False)
    assert (settled(agent), agent.set) == (None, 0)


def test_report_says_that_a_guest_was_stopped_for_long() -> None:
    report = Report("web", "domain", source_version="7", destination_version="8", downtimes_ms=[600.0, 700.0])
    report.clock = Clock(True)
    assert str(report).splitlines()[1:] == ["note: the guest was stopped for 1.3 s; its guest agent has set the clock"]
    json = report.as_json()
    assert (json["stopped_ms"], json["clock"]) == (1300.0, {"set": True, "detail": ""})
    report.reason, report.clock = "restore: it failed", Clock(False, "it has no guest agent")
    why = "the guest was stopped for 1.3 s; its clock was not set: it has no guest agent"
    assert str(report) == f"web: restore: it failed; {why}"


def test_report_does_not_mention_the_clock_after_a_short_stop() -> None:
    report = Report("web", source_version="7", destination_version="8", downtime_ms=400.0, rehearsal_ms=500.0)
    assert report.stopped_ms == 900.0
    assert "clock" not in str(report)
    assert report.as_json()["clock"] is None


def test_stop_of_the_rehearsal_counts() -> None:
    assert "stopped for 1.1 s" in str(Report("web", downtime_ms=600.0, rehearsal_ms=500.0))


def test_recovery_says_that_a_guest_was_stopped_for_long() -> None:
    one = RecoveredGuest("web", RecoveryOutcome.DESTINATION, "a note", 7.2e6)
    assert str(one) == "web: runs in the new QEMU: a note; the guest was stopped for 7200.0 s: its clock may be behind"
    assert one.as_json()["stopped_ms"] == 7.2e6
