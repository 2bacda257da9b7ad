"""libvirt's monitor of a source, and the events that libvirt passes on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sevhop.libvirt import domain_monitor
from sevhop.libvirt.qemu_events import QemuEvents
from sevhop.libvirt.source_monitor import DomainSourceMonitor
from sevhop_qmp.errors import MonitorClosed


class Process:
    """The domain's QEMU."""

    alive = True


class Domain:
    """libvirt's."""

    name = "web1"
    raw = None


def monitor(process: Any, events: Any = None) -> DomainSourceMonitor:
    domain: Any = Domain()
    return DomainSourceMonitor(domain, process, events, 3.0)


@pytest.fixture(autouse=True)
def commands(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Those that reach libvirt."""
    sent: list[str] = []

    async def in_thread(timeout: float, function: Any, raw: Any, text: str, *_: Any) -> tuple[str, list[int]]:
        sent.append(text)
        return '{"return": {}}', []

    monkeypatch.setattr(domain_monitor, "in_thread", in_thread)
    return sent


def test_command_is_sent_while_the_source_lives(commands: list[str]) -> None:
    asyncio.run(monitor(Process()).execute("query-status"))
    assert commands == ['{"execute": "query-status"}']


def test_no_command_is_sent_to_the_next_qemu_of_the_domain(commands: list[str]) -> None:
    process = Process()
    one = monitor(process)
    process.alive = False
    assert one.closed
    with pytest.raises(MonitorClosed):
        asyncio.run(one.execute("remove-fd", {"fdset-id": 1}))
    assert commands == []


def test_no_command_is_sent_to_a_source_that_was_halted(commands: list[str]) -> None:
    async def closed() -> None:
        one = monitor(Process())
        await one.close()
        await one.execute("query-status")

    with pytest.raises(MonitorClosed):
        asyncio.run(closed())
    assert commands == []


def test_events_are_collected_in_their_order() -> None:
    connection: Any = None
    events = QemuEvents(connection)
    with monitor(Process(), events).events("STOP", "BLOCK_IO_ERROR") as collected:
        assert collected.empty()
        for name, details in (("STOP", None), ("RTC_CHANGE", "{}"), ("BLOCK_IO_ERROR", '{"action": "stop"}')):
            events._received(None, None, name, 1, 2, details, None)
        found = [(event["event"], event["data"]) for event in collected.clear()]
    assert found == [("STOP", {}), ("BLOCK_IO_ERROR", {"action": "stop"})]
    assert collected.empty()
    events._received(None, None, "STOP", 1, 2, "no JSON", None)
    assert collected.empty()
