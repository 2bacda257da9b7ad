"""A guest that cannot be reset reboots in the transit: its QEMU shuts down, and leaves a mark."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from sevhop.engine.transit import has_rebooted, leave_reboot_mark
from sevhop.keeper.config import TransitConfig
from sevhop.transit_keeper.watch import End, TransitWatch
from sevhop_qmp.errors import CommandError


class Transit:
    """A QEMU that was given a mark."""

    def __init__(self, directory: Path, *, refuses: bool = False) -> None:
        self.directory = directory
        self.monitor = self
        self.refuses = refuses
        self.mark = -1

    async def send_fd(self, name: str, fd: int) -> None:
        self.mark = os.dup(fd)

    async def execute(self, command: str, arguments: object = None, **_: object) -> Any:
        if command == "query-status":
            return {"status": "shutdown"}
        if self.refuses:
            raise CommandError(command, "it has no shutdown notifier")
        return {}


class Events:
    """Nothing was heard since the connection."""

    def empty(self) -> bool:
        return True


def left(directory: Path, *, refuses: bool = False) -> tuple[Transit, str]:
    transit: Any = Transit(directory, refuses=refuses)
    return transit, asyncio.run(leave_reboot_mark(transit))


def end_of(directory: Path) -> End | None:
    """How the keeper explains a transit that had shut down before it was connected."""
    config = TransitConfig("", str(directory), on_poweroff="destroy", on_reboot="restart")
    watch: Any = TransitWatch(config, os.getpid(), 1.0)
    found: End | None = asyncio.run(watch._look(Transit(directory), Events()))
    return found


def test_reboot_that_nobody_has_heard_of_is_found(tmp_path: Path) -> None:
    transit, note = left(tmp_path)
    assert (note, has_rebooted(tmp_path)) == ("", False)
    assert end_of(tmp_path) == End("the guest has shut down", "destroy")
    os.pwrite(transit.mark, b"\1", 0)
    os.close(transit.mark)
    assert end_of(tmp_path) == End("the guest has rebooted", "restart")


def test_transit_without_a_mark_is_noted(tmp_path: Path) -> None:
    transit, note = left(tmp_path, refuses=True)
    os.close(transit.mark)
    assert "it has no shutdown notifier" in note
    assert "cannot record reboots" in left(tmp_path)[1], "there is one already"
    assert not has_rebooted(tmp_path / "none")


def test_guest_without_a_mark_has_shut_down(tmp_path: Path) -> None:
    assert end_of(tmp_path) == End("the guest has shut down", "destroy")
