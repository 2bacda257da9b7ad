"""A monitor of a real QEMU."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest
from sevhop_qmp.errors import MonitorClosed
from sevhop_qmp.monitor import Monitor

from .conftest import DescribeCounter, StartGuest


def test_first_data_callback_is_called_once(new: Path, counter_machine: DescribeCounter, start: StartGuest) -> None:
    """It is called once, before the data is parsed, and not while there is none."""
    guest = start(counter_machine(), new)
    order: list[str] = []

    async def play() -> None:
        async with await Monitor.connect(guest.machine.monitor) as monitor:
            with monitor.on_first_data(lambda: order.append("data")):
                for command in ("stop", "cont"):
                    await monitor.execute(command)
                    order.append(command)
            with monitor.on_first_data(lambda: order.append("more data")):
                pass
            await monitor.execute("query-status")

    asyncio.run(play())
    assert order == ["data", "stop", "cont"]


def test_exited_qemu_sends_nothing(new: Path, counter_machine: DescribeCounter, start: StartGuest) -> None:
    guest = start(counter_machine(), new)

    async def play() -> None:
        async with await Monitor.connect(guest.machine.monitor) as monitor:
            await monitor.execute("quit")
            with contextlib.suppress(MonitorClosed):
                while True:
                    await monitor.execute("query-status")
            await monitor.close()
            with pytest.raises(MonitorClosed, match="QEMU has hung up"), monitor.on_first_data(lambda: None):
                pass

    asyncio.run(play())
