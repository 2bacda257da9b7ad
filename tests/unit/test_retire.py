"""Retiring the QEMU of a domain whose guest is elsewhere."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest
from sevhop.engine.retire import retire
from sevhop_qmp import stream_sockets
from sevhop_qmp.errors import SevhopError


class Retired:
    """A domain and its QEMU, which notes what is done to both."""

    pid = 4711

    def __init__(self, *, exits: bool = True) -> None:
        self._exits = exits
        self.done: list[str] = []

    def kill(self) -> None:
        self.done.append("kill")

    async def wait(self, timeout: float) -> bool:
        self.done.append("wait")
        return self._exits

    async def wait_reaped(self, timeout: float) -> bool:
        self.done.append("wait until it is reaped")
        return True

    async def destroy(self) -> None:
        self.done.append("destroy")


@pytest.fixture(autouse=True)
def connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_sockets, "connections", lambda *_: [])


def test_libvirt_cleans_up_when_the_source_has_exited() -> None:
    both: Any = Retired()
    asyncio.run(retire(both, both, 1.0))
    assert both.done == ["kill", "wait", "wait until it is reaped", "destroy"]


def test_libvirt_is_not_asked_while_the_source_exists() -> None:
    both: Any = Retired(exits=False)
    with pytest.raises(SevhopError, match=r"cannot kill the old QEMU \(process 4711\)"):
        asyncio.run(retire(both, both, 1.0))
    assert both.done == ["kill", "wait"]


def test_libvirt_is_hung_up_on_if_it_waits_for_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another client has asked something, and there is nobody who would answer."""
    reader, writer = os.pipe()
    monkeypatch.setattr(stream_sockets, "connections", lambda *_: [writer])

    class Waiting(Retired):
        async def destroy(self) -> None:
            assert await asyncio.to_thread(os.read, reader, 1) == b""
            await super().destroy()

    both: Any = Waiting()
    asyncio.run(retire(both, both, 1.0))
    os.close(reader)
    assert both.done[-1] == "destroy"
