"""After the commit: what the phase finish, and a recovery, do with the two QEMUs."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sevhop.engine.finish import complete
from sevhop.engine.guest_paths import GuestPaths
from sevhop.errors import RecoveryRequired


class Qemu:
    """Either of the two. It stands in for its process and its monitor, too."""

    def __init__(self, *, alive: bool) -> None:
        self.alive = alive
        self.process = self
        self.monitor = self
        self.done: list[str] = []

    def kill(self) -> None:
        self.done.append("killed")

    def protect(self, *_: object) -> None:
        self.done.append("protected")

    async def close(self) -> None:
        self.done.append("closed")


def test_source_is_kept_if_the_destination_has_exited() -> None:
    """It may have exited before the guest ran there: then the source has all of it."""
    source: Any = Qemu(alive=True)
    destination: Any = Qemu(alive=False)
    work = complete(source, destination, GuestPaths([]), oom_score_adj=0, timeout=1.0, note=pytest.fail)
    with pytest.raises(RecoveryRequired, match="the new QEMU exited after the commit"):
        asyncio.run(work)
    assert (source.done, destination.done) == ([], ["closed"])
