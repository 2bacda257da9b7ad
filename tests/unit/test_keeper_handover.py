"""The keeper of a hop: which comes first, the destination's message that the guest runs or its revocation."""

from __future__ import annotations

import asyncio
import resource

import pytest
from sevhop.guest.inspection import SevContext
from sevhop.keeper.handover import SourceHandles
from sevhop.keeper.local import LocalKeeper


def keeper() -> LocalKeeper:
    """One without any handles."""
    return LocalKeeper(SourceHandles(None, {}), SevContext("none"))


def test_keeper_is_possible_with_few_descriptors() -> None:
    """Its number is above all others."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        ours = keeper()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert 200 < ours._ours.fileno() < 256
    ours._ours.close()
    ours.theirs.close()


def test_start_that_was_announced_cannot_be_revoked() -> None:
    async def play() -> None:
        with keeper() as ours:
            ours.theirs.send(b"run")
            assert ours.revoke_start()

    asyncio.run(play())


def test_guest_does_not_run_after_its_start_was_revoked() -> None:
    async def play() -> None:
        with keeper() as ours:
            assert not ours.revoke_start()
            with pytest.raises(BrokenPipeError):
                ours.theirs.send(b"run")
            assert not ours.revoke_start()

    asyncio.run(play())


def test_destination_that_exited_may_have_started_the_guest() -> None:
    for message in (b"", b"run"):

        async def play(message: bytes) -> None:
            with keeper() as ours:
                if message:
                    ours.theirs.send(message)
                ours.theirs.close()
                assert ours.revoke_start() == bool(message)

        asyncio.run(play(message))


def test_destination_is_notified_that_its_guest_cannot_be_reset() -> None:
    async def play() -> None:
        handles, context = SourceHandles(None, {}), SevContext("sev", handle=3)
        with LocalKeeper(handles, context, stops_at_reboot=True) as ours:
            ours.theirs.send(b"hello 1")
            reply = await asyncio.to_thread(ours.theirs.recv, 4096)
            assert reply == b"ok context=sev source=running handle=3 reboot=shutdown"

    asyncio.run(play())


def test_requests_are_answered_until_the_guest_runs() -> None:
    async def play() -> None:
        with keeper() as ours:
            for request, reply in (
                (b"hello 1", b"ok context=none source=running"),
                (b"hello 2", b"error protocol version 2 is not supported, only 1"),
                (b"memfd 0 memory-backend-memfd", b"none"),
                (b"\xff", b"error invalid request"),
            ):
                ours.theirs.send(request)
                assert await asyncio.to_thread(ours.theirs.recv, 4096) == reply
            ours.theirs.send(b"run")
            async with asyncio.timeout(10):
                await ours.runs.wait()

    asyncio.run(play())
