"""Recovery of a domain whose keeper does not answer, or has exited."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sevhop.engine import domain_recovery
from sevhop.engine.domain_recovery import InterruptedUpgrade
from sevhop.engine.recovery_result import RecoveryOutcome
from sevhop.keeper.client import KeeperClient
from sevhop.keeper.config import KeeperTimeout
from sevhop.options import RecoverOptions
from sevhop.process import apparmor_profile
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


class Found:
    """A journal, and a libvirt that has no such domain any more."""

    def __init__(self, record: HopRecord) -> None:
        self.record = record

    def write(self, fields: dict[str, Any]) -> None:
        """Nothing is written."""

    async def domain_with(self, uuid: str) -> None:
        return None


@pytest.mark.parametrize("transit", [None, Process(1 << 30, 2)], ids=["not started", "exited"])
def test_profile_of_a_transit_that_is_not_there_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transit: Process | None
) -> None:
    removed: list[str] = []
    monkeypatch.setattr(apparmor_profile, "remove", removed.append)
    fields: Any = {"transit": transit, "committed": transit is not None, "apparmor_profile": "libvirt-1-2"}
    found: Any = Found(replace(record(tmp_path), **fields))
    recovered = asyncio.run(domain_recovery._settle(found, found, named=True, options=RecoverOptions(step_timeout=1.0)))
    assert (recovered.result, removed) == (RecoveryOutcome.GONE, ["libvirt-1-2"])
