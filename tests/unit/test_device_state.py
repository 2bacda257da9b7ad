"""The stream between the two sides: nothing is lost on the way, whatever its size and whoever is slow."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
from sevhop_qmp.device_state import EMPTY_DESCRIPTION, MAGIC, IncomingState, OutgoingState, header
from sevhop_qmp.errors import StateError

HEAD = header("pc-q35-7.2")
#: QEMU_VM_SECTION_FULL: whatever device comes first.
SECTION = b"\x04"
#: More than a pipe takes.
LARGE = os.urandom(3 << 20)


class FakeMonitor:
    """Of a QEMU that does nothing: the test does it, with the descriptors that QEMU has been given."""

    def __init__(self) -> None:
        self.fds: list[int] = []
        self.name = "fake"
        self.asked: list[str] = []
        self.answered = asyncio.Event()

    async def send_fd(self, name: str, fd: int) -> None:
        self.fds.append(os.dup(fd))

    async def add_fd(self, fd: int) -> tuple[int, int]:
        self.fds.append(os.dup(fd))
        return 1, self.fds[-1]

    @contextlib.contextmanager
    def events(self, *_: str) -> Any:
        yield None

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None, **_: object) -> Any:
        self.asked.append(command)
        if command == "xen-save-devices-state":
            await self.answered.wait()
        return {"mappings": 1, "bytes": 1}


@contextlib.asynccontextmanager
async def sides() -> AsyncIterator[tuple[FakeMonitor, OutgoingState, FakeMonitor, IncomingState]]:
    """Source and destination, armed; the source is saving."""
    source, destination = FakeMonitor(), FakeMonitor()
    with IncomingState(destination) as incoming:  # type: ignore[arg-type]
        await incoming.arm(HEAD)
        async with OutgoingState(source, incoming) as outgoing:  # type: ignore[arg-type]
            await outgoing.arm(os.getuid(), os.getgid())
            outgoing.begin()
            yield source, outgoing, destination, incoming
    for fd in (*source.fds, *destination.fds):
        os.close(fd)


def written(fd: int, data: bytes) -> None:
    """Write all of it, as a QEMU does: it waits for room."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def read(fd: int) -> bytes:
    """Until the end of the file."""
    parts = []
    while part := os.read(fd, 1 << 20):
        parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("state", [b"", b"x", LARGE], ids=["empty", "short", "large"])
def test_device_state_arrives_completely(state: bytes) -> None:
    async def play() -> None:
        async with sides() as (source, outgoing, destination, incoming):
            # Until the source has stopped nothing of the guest goes over.
            assert os.read(destination.fds[0], 1 << 20) == HEAD
            received = asyncio.ensure_future(asyncio.to_thread(read, destination.fds[0]))

            async def save() -> None:
                await asyncio.to_thread(written, source.fds[0], MAGIC + SECTION + state)
                source.answered.set()

            saving = asyncio.ensure_future(save())
            outgoing.send_first_byte()
            await outgoing.forward()
            await saving
            assert not received.done()
            await outgoing.end()
            assert await received == SECTION + state + EMPTY_DESCRIPTION
            assert incoming.image == SECTION + state + EMPTY_DESCRIPTION

    asyncio.run(play())


def test_device_state_waits_for_forward() -> None:
    async def play() -> None:
        async with sides() as (source, outgoing, destination, incoming):
            written(source.fds[0], MAGIC + SECTION + b"state")
            source.answered.set()
            await asyncio.sleep(0)
            os.set_blocking(destination.fds[0], False)
            assert os.read(destination.fds[0], 1 << 20) == HEAD
            assert not incoming.image
            # The destination is busy with the first byte until the rest comes.
            outgoing.send_first_byte()
            assert os.read(destination.fds[0], 1 << 20) == SECTION
            await asyncio.sleep(0)
            await outgoing.forward()
            # All but its last byte: a killed hop closes the stream as well, and the destination must not accept that.
            assert os.read(destination.fds[0], 1 << 20) == b"stat"
            await outgoing.end()
            assert os.read(destination.fds[0], 1 << 20) == b"e" + EMPTY_DESCRIPTION

    asyncio.run(play())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", r"the old QEMU wrote none \(try again"),
        (MAGIC[:4], r"its stream begins with 5145564d \("),
        (b"\x7fELF12345", r"its stream begins with 7f454c463132333435 \("),
        (MAGIC + b"\x01state", r"its stream begins with 5145564d0000000301 \("),
    ],
)
def test_forward_refuses_other_streams(data: bytes, reason: str) -> None:
    async def play() -> None:
        async with sides() as (source, outgoing, _, incoming):
            os.write(source.fds[0], data)
            source.answered.set()
            with pytest.raises(StateError, match=reason):
                await outgoing.forward()
            assert not incoming.image

    asyncio.run(play())


def test_forward_fails_if_the_destination_stops_reading() -> None:
    async def play() -> None:
        async with sides() as (source, outgoing, destination, _):
            for fd in destination.fds:
                os.close(fd)
            destination.fds.clear()
            os.write(source.fds[0], MAGIC + SECTION + b"state")
            source.answered.set()
            with pytest.raises(StateError, match="stopped reading"):
                await outgoing.forward()

    asyncio.run(play())


def test_forward_fails_if_the_destination_is_too_slow() -> None:
    async def play() -> None:
        async with sides() as (source, outgoing, _, _):
            saving = asyncio.ensure_future(asyncio.to_thread(written, source.fds[0], MAGIC + SECTION + LARGE))
            passing = asyncio.ensure_future(outgoing.forward(timeout=0.01))
            await saving
            source.answered.set()
            with pytest.raises(StateError, match=r"not read within 0\.01 s"):
                await passing

    asyncio.run(play())


@pytest.mark.parametrize("passing", [False, True], ids=["at once", "on its way"])
def test_device_state_is_drained_and_dropped_when_abandoned(passing: bool) -> None:
    """A QEMU that cannot write its state leaks a descriptor."""

    async def play() -> None:
        async with sides() as (source, outgoing, _, incoming):

            async def save() -> None:
                await asyncio.to_thread(written, source.fds[0], MAGIC + SECTION + LARGE * 2)
                source.answered.set()

            if passing:
                task = asyncio.ensure_future(outgoing.forward())
                await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait({task})
            saving = asyncio.ensure_future(save())
            await outgoing.abandon()
            await saving
            assert not incoming.image

    asyncio.run(play())
