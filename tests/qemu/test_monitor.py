"""A monitor of a real QEMU."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest
from sevhop_qmp.errors import MonitorClosed
from sevhop_qmp.monitor import Monitor

from .conftest import DescribeCounter, StartGuest


def test_the_first_word(new: Path, counter_machine: DescribeCounter, start: StartGuest) -> None:
    """It is told of once, before what it means, and not when the monitor stays silent."""
    guest = start(counter_machine(), new)
    told: list[str] = []

    async def play() -> None:
        async with await Monitor.connect(guest.machine.monitor) as monitor:
            with monitor.at_the_first_word(lambda: told.append("a word")):
                for command in ("stop", "cont"):
                    await monitor.execute(command)
                    told.append(command)
            with monitor.at_the_first_word(lambda: told.append("another")):
                pass
            await monitor.execute("query-status")

    asyncio.run(play())
    assert told == ["a word", "stop", "cont"]


def test_a_qemu_that_has_ended_says_nothing(new: Path, counter_machine: DescribeCounter, start: StartGuest) -> None:
    guest = start(counter_machine(), new)

    async def play() -> None:
        async with await Monitor.connect(guest.machine.monitor) as monitor:
            await monitor.execute("quit")
            with contextlib.suppress(MonitorClosed):
                while True:
                    await monitor.execute("query-status")
            await monitor.close()
            with pytest.raises(MonitorClosed, match="QEMU has hung up"), monitor.at_the_first_word(lambda: None):
                pass

    asyncio.run(play())
