"""Recovery of a domain whose keeper does not answer, or has exited."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest
from sevhop.engine import domain_recovery
from sevhop.engine.domain_recovery import InterruptedUpgrade
from sevhop.keeper.client import KeeperClient
from sevhop.keeper.config import KeeperTimeout
from sevhop.records.hop_record import HopRecord, Process


def record(directory: Path) -> HopRecord:
    """... of an upgrade whose old QEMU has exited."""
    source = Process(1 << 30, 1)
    return HopRecord(
        kind="domain", guest="web1", context="none", running=True, source=source, directory=str(directory), uuid="uuid"
    )


def test_keeper_that_hangs_is_not_taken_for_one_that_has_exited(tmp_path: Path) -> None:
    """Otherwise the guest, which it has, would be reported as gone."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "control"))
        listener.listen()
        with pytest.raises(KeeperTimeout):
            asyncio.run(domain_recovery._keeper(record(tmp_path), 0.05))


def test_keeper_that_begins_to_hang_is_not_taken_for_one_that_has_exited(tmp_path: Path) -> None:
    async def recover() -> None:
        keeper = await KeeperClient.connect(tmp_path)
        keeper.timeout = 0.05
        connection: Any = None
        try:
            await InterruptedUpgrade(record(tmp_path), connection, keeper, None).settle(named=True)
        finally:
            keeper.close()

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "control"))
        listener.listen()
        with pytest.raises(KeeperTimeout):
            asyncio.run(recover())


def test_keeper_that_has_exited_is_none(tmp_path: Path) -> None:
    assert asyncio.run(domain_recovery._keeper(record(tmp_path), 0.05)) is None
