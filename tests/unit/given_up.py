"""A simulated libvirt for guests that are given up; journal and run directory are the test's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sevhop.engine import discard, way_back
from sevhop.libvirt.daemon import DomainError
from sevhop.records import journal, run_directory
from sevhop.records.hop_record import HopRecord, Process

UUID = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
GONE = Process(1 << 30, 1)
RECORD = HopRecord(
    kind="domain", guest="web1", uuid=UUID, context="none", running=True, source=GONE, uri="qemu:///system"
)


class Libvirt:
    """
    A daemon with one domain.

    :ivar has_qemu: whether that is active.
    """

    def __init__(self) -> None:
        self.has_qemu = False
        self.answers = True

    async def open(self, *_: Any) -> Libvirt:
        """In the place of ``Connection.open``."""
        if not self.answers:
            raise DomainError("no daemon")
        return self

    def close(self) -> None:
        """Nothing to do."""

    async def domain_with(self, uuid: str) -> Libvirt:
        return self

    async def active(self) -> bool:
        return self.has_qemu


@pytest.fixture
def libvirt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Libvirt:
    """A daemon; run directory and journal are the test's."""
    made = Libvirt()
    monkeypatch.setattr(discard, "Connection", made)
    monkeypatch.setattr(journal, "DIRECTORY", tmp_path / "journal")
    monkeypatch.setattr(run_directory, "RUN", tmp_path / "run")
    monkeypatch.setattr(run_directory, "DOMAINS", tmp_path / "run/domains")

    async def forget(uri: str, finished: str) -> None:
        assert (uri, finished) == (RECORD.uri, UUID)

    monkeypatch.setattr(way_back, "forget_unused_at", forget)
    return made
