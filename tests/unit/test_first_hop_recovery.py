"""The recovery of a hop into a transit leaves that for what comes next."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from sevhop.engine.destination import Destination
from sevhop.engine.first_hop_recovery import InterruptedFirstHop
from sevhop.records.hop_record import HopRecord, Process
from sevhop_qmp import adopt
from sevhop_qmp.process import QemuProcess


class Monitor:
    """Of the transit."""

    closed = False

    async def close(self) -> None:
        self.closed = True


class Qemus:
    """Source and transit."""

    def __init__(self, transit: QemuProcess, monitor: Monitor) -> None:
        self._transit = transit
        self._monitor: Any = monitor
        self.halted = 0

    async def halt(self) -> None:
        self.halted += 1

    async def take(self) -> Destination:
        destination = Destination(self._transit, Path("/nowhere"))
        destination.monitor = self._monitor
        return destination


def test_transit_is_released_and_its_process_stays_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    finished: list[object] = []

    async def finish(monitor: object) -> None:
        finished.append(monitor)

    monkeypatch.setattr(adopt, "finish", finish)
    monkeypatch.setattr(Destination, "protect", lambda *_: None)
    process, monitor = QemuProcess.open(os.getpid()), Monitor()
    qemus: Any = Qemus(process, monitor)
    record = HopRecord(kind="domain", guest="web", context="sev", running=True, source=Process.of(process))
    asyncio.run(InterruptedFirstHop(qemus, qemus, 1.0)._complete(record, []))
    assert (finished, monitor.closed, qemus.halted) == ([monitor], True, 1)
    assert process.alive
    process.close()
