"""What events of a source mean for a hop."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from qemu.qmp import EventListener, Message
from sevhop.engine.source_watch import SourceWatch
from sevhop_qmp.errors import SevhopError


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run a test in an event loop."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        async def awaited() -> None:
            await test(**fixtures)

        asyncio.run(awaited())

    return run


class Source:
    """A monitor that delivers the events of a test."""

    def __init__(self) -> None:
        self.listener = EventListener()
        self.misses_events = False
        self.state = "paused"

    async def execute(self, command: str) -> dict[str, object]:
        assert command == "query-status"
        return {"status": self.state, "running": self.state == "running"}

    async def has_events(self, listener: EventListener) -> bool:
        return not listener.empty()

    async def emit(self, name: str, **data: Any) -> None:
        await self.listener.put(Message({"event": name, "data": data}))


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def watch(source: Source) -> SourceWatch:
    return SourceWatch(source, source.listener)  # type: ignore[arg-type]


@in_loop
async def test_quiet_guest_is_stopped_and_resumed(source: Source, watch: SourceWatch) -> None:
    await watch.verify_undisturbed()
    watch.stopping()
    await source.emit("STOP")
    await watch.verify_stopped(was_running=True)
    assert await watch.stopped_by_us()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("STOP", {}),
        ("RESUME", {}),
        ("SHUTDOWN", {"guest": True}),
        ("GUEST_PANICKED", {"action": "pause"}),
        ("BLOCK_IO_ERROR", {"action": "stop"}),
        ("JOB_STATUS_CHANGE", {"id": "job", "status": "created"}),
        ("BLOCK_JOB_COMPLETED", {}),
        ("DEVICE_DELETED", {"device": "disk"}),
        ("DEVICE_TRAY_MOVED", {}),
        ("MEMORY_DEVICE_SIZE_CHANGE", {}),
    ],
)
@in_loop
async def test_change_before_the_stop_is_an_error(
    name: str, data: dict[str, Any], source: Source, watch: SourceWatch
) -> None:
    await source.emit(name, **data)
    with pytest.raises(SevhopError):
        await watch.verify_undisturbed()


@pytest.mark.parametrize(
    ("name", "data"), [("BLOCK_IO_ERROR", {"action": "report"}), ("WATCHDOG", {"action": "none"}), ("RESET", {})]
)
@in_loop
async def test_events_that_do_not_stop_the_guest_are_no_error(
    name: str, data: dict[str, Any], source: Source, watch: SourceWatch
) -> None:
    await source.emit(name, **data)
    await watch.verify_undisturbed()


@in_loop
async def test_guest_that_our_order_has_not_stopped_is_not_resumed(source: Source, watch: SourceWatch) -> None:
    await source.emit("STOP")
    watch.stopping()
    with pytest.raises(SevhopError, match="stopped by another client"):
        await watch.verify_stopped(was_running=True)
    assert not await watch.stopped_by_us()


@pytest.mark.parametrize("name", ["SHUTDOWN", "GUEST_PANICKED", "BLOCK_IO_ERROR", "WATCHDOG"])
@in_loop
async def test_guest_that_shuts_down_while_it_is_stopped_is_not_resumed(
    name: str, source: Source, watch: SourceWatch
) -> None:
    watch.stopping()
    await source.emit(name, action="stop")
    await source.emit("STOP")
    with pytest.raises(SevhopError):
        await watch.verify_stopped(was_running=True)
    assert not await watch.stopped_by_us()


@pytest.mark.parametrize("name", ["RESUME", "RESET", "DEVICE_DELETED", "JOB_STATUS_CHANGE"])
@pytest.mark.parametrize("was_running", [True, False])
@in_loop
async def test_change_of_a_stopped_guest_is_an_error(
    name: str, was_running: bool, source: Source, watch: SourceWatch
) -> None:
    watch.stopping()
    if was_running:
        await source.emit("STOP")
    await source.emit(name)
    with pytest.raises(SevhopError):
        await watch.verify_stopped(was_running=was_running)


@in_loop
async def test_paused_guest_is_not_resumed(source: Source, watch: SourceWatch) -> None:
    watch.stopping()
    await watch.verify_stopped(was_running=False)
    assert not await watch.stopped_by_us()


@pytest.mark.parametrize(("state", "ours"), [("paused", True), ("io-error", False), ("running", False)])
@in_loop
async def test_guest_is_resumed_by_its_state_if_events_were_lost(
    state: str, ours: bool, source: Source, watch: SourceWatch
) -> None:
    """Otherwise it would stay stopped when libvirt is restarted in the downtime. But it does not hop."""
    watch.stopping()
    source.misses_events, source.state = True, state
    assert await watch.stopped_by_us() == ours
    with pytest.raises(SevhopError, match="libvirt was restarted"):
        await watch.verify_stopped(was_running=True)
    with pytest.raises(SevhopError, match="libvirt was restarted"):
        await watch.verify_undisturbed()
