"""The keeper of a hop: who comes first, the destination that says that the guest runs or who forbids it."""

from __future__ import annotations

import asyncio

import pytest
from sevhop.guest.inspection import SevContext
from sevhop.keeper.handover import Held, Keeper


def keeper() -> Keeper:
    """One that holds nothing."""
    return Keeper(Held(None, {}), SevContext("none"))


def test_a_guest_that_runs_cannot_be_forbidden_to() -> None:
    async def play() -> None:
        with keeper() as ours:
            ours.theirs.send(b"run")
            assert ours.forbid()

    asyncio.run(play())


def test_a_guest_that_is_forbidden_to_run_cannot() -> None:
    async def play() -> None:
        with keeper() as ours:
            assert not ours.forbid()
            with pytest.raises(BrokenPipeError):
                ours.theirs.send(b"run")
            assert not ours.forbid()

    asyncio.run(play())


def test_a_destination_that_has_ended_may_have_let_it_run() -> None:
    for said in (b"", b"run"):

        async def play(said: bytes) -> None:
            with keeper() as ours:
                if said:
                    ours.theirs.send(said)
                ours.theirs.close()
                assert ours.forbid() == bool(said)

        asyncio.run(play(said))


def test_requests_are_answered_meanwhile() -> None:
    async def play() -> None:
        with keeper() as ours:
            for request, reply in (
                (b"hello 1", b"ok context=none source=running"),
                (b"hello 2", b"no protocol 2 is not spoken here, only 1"),
                (b"memfd 0 memory-backend-memfd", b"none"),
                (b"\xff", b"no this is not a request"),
            ):
                ours.theirs.send(request)
                assert await asyncio.to_thread(ours.theirs.recv, 4096) == reply
            ours.theirs.send(b"run")
            async with asyncio.timeout(10):
                await ours.runs.wait()

    asyncio.run(play())
