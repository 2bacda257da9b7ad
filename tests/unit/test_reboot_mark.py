"""The reboot mark of a domain: who gets one, and that it stays."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sevhop.keeper.domain_reboot import stop_at_reboot
from sevhop.records import reboot_mark, run_directory
from sevhop_qmp.errors import CommandError

from .keeper_config import UUID, config
from .marks import redirect_marks


@pytest.fixture
def reboots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the marks are."""
    return redirect_marks(tmp_path, monkeypatch)


class Monitor:
    """Of a destination that takes the mark, or refuses."""

    name = "web"
    version = "10.0.0"

    def __init__(self, *, refuses: str = "") -> None:
        self.sent: list[tuple[str, bytes]] = []
        self.executed: list[tuple[str, Any]] = []
        self._refuses = refuses

    async def send_fd(self, name: str, fd: int) -> None:
        self.sent.append((name, os.pread(fd, 2, 0)))

    async def execute(self, command: str, arguments: Any = None) -> Any:
        self.executed.append((command, arguments))
        if self._refuses == command:
            raise CommandError(command, "no", "GenericError")


def stop(monitor: Monitor, *, stops: bool) -> str:
    return asyncio.run(stop_at_reboot(replace(config(), stops_at_reboot=stops), monitor))  # type: ignore[arg-type]


def test_domain_that_cannot_be_reset_gets_a_mark(reboots: Path) -> None:
    monitor = Monitor()
    for _ in range(2):
        assert stop(monitor, stops=True) == ""
    assert monitor.sent == [("sevhop-reboot-mark", b"\0")] * 2
    executed = [("set-action", {"reboot": "shutdown"}), ("x-sev-reboot-mark", {"fd": "sevhop-reboot-mark"})]
    assert monitor.executed == executed * 2
    assert (reboots / "web" / "mark").read_bytes() == b"\0"
    assert (reboots / "web" / "domain").read_text() == f"{UUID} qemu:///system"
    assert {path.stat().st_mode & 0o777 for path in (reboots, reboots / "web")} == {0o700}
    assert reboot_mark.names() == ["web"]


def test_domain_that_can_be_reset_keeps_no_mark_and_is_asked_nothing(reboots: Path) -> None:
    assert reboot_mark.names() == []
    stop(Monitor(), stops=True)
    monitor = Monitor()
    assert stop(monitor, stops=False) == ""
    assert (monitor.sent, monitor.executed, list(reboots.iterdir())) == ([], [], [])


def test_mark_that_a_destination_refuses_is_removed(reboots: Path) -> None:
    note = stop(Monitor(refuses="x-sev-reboot-mark"), stops=True)
    assert note == (
        "cannot record reboots of the guest: x-sev-reboot-mark: no; its next reboot is a shutdown, after which the "
        "domain stays off; start it then (virsh start)"
    )
    assert list(reboots.iterdir()) == []


def test_destination_that_does_not_shut_down_at_a_reboot_gets_no_guest(reboots: Path) -> None:
    with pytest.raises(CommandError):
        stop(Monitor(refuses="set-action"), stops=True)
    assert not reboots.exists()


def test_marks_are_not_swept(reboots: Path) -> None:
    os.close(reboot_mark.make("web", UUID, "qemu:///system"))
    run_directory.sweep(set())
    assert (reboots / "web" / "mark").exists()
