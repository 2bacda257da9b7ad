"""The reboot mark of a domain: who gets one, and that it stays."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from sevhop.engine.domain_reboot import record_reboots
from sevhop.records import reboot_mark, run_directory
from sevhop_qmp.errors import CommandError

UUID = "11111111-2222-3333-4444-55555555550a"


@pytest.fixture
def reboots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the marks are."""
    run = tmp_path / "sevhop"
    monkeypatch.setattr(run_directory, "RUN", run)
    monkeypatch.setattr(run_directory, "DOMAINS", run / "domains")
    for module in (run_directory, reboot_mark):
        monkeypatch.setattr(module, "REBOOTS", run / "reboot")
    return run / "reboot"


class Monitor:
    """Of a destination that takes the mark, or refuses."""

    name = "web"
    version = "10.0.0"

    def __init__(self, *, refuses: bool = False) -> None:
        self.sent: list[tuple[str, bytes]] = []
        self.executed: list[tuple[str, Any]] = []
        self._refuses = refuses

    async def send_fd(self, name: str, fd: int) -> None:
        self.sent.append((name, os.pread(fd, 2, 0)))

    async def execute(self, command: str, arguments: Any = None) -> Any:
        self.executed.append((command, arguments))
        if self._refuses:
            raise CommandError(command, "no", "GenericError")


def record(monitor: Monitor, *, stops: bool) -> list[str]:
    return asyncio.run(record_reboots(monitor, "web", UUID, "qemu:///system", stops=stops))  # type: ignore[arg-type]


def test_domain_that_cannot_be_reset_gets_a_mark(reboots: Path) -> None:
    monitor = Monitor()
    for _ in range(2):
        assert record(monitor, stops=True) == []
    assert monitor.sent == [("sevhop-reboot-mark", b"\0")] * 2
    assert monitor.executed == [("x-sev-reboot-mark", {"fd": "sevhop-reboot-mark"})] * 2
    assert (reboots / "web" / "mark").read_bytes() == b"\0"
    assert (reboots / "web" / "domain").read_text() == f"{UUID} qemu:///system"
    assert {path.stat().st_mode & 0o777 for path in (reboots, reboots / "web")} == {0o700}
    assert record(monitor, stops=False) == []
    assert list(reboots.iterdir()) == []


def test_mark_that_a_destination_refuses_is_removed(reboots: Path) -> None:
    (note,) = record(Monitor(refuses=True), stops=True)
    assert note.startswith("a reboot of the guest will be a shutdown, after which the domain stays off: ")
    assert list(reboots.iterdir()) == []


def test_marks_are_not_swept(reboots: Path) -> None:
    os.close(reboot_mark.make("web", UUID, "qemu:///system"))
    run_directory.sweep(set())
    assert (reboots / "web" / "mark").exists()
