"""Where a guest is when its hop out of the transit has failed, or its keeper has died: the context decides."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from sevhop.engine import transit_move
from sevhop.keeper import destination
from sevhop.keeper.handover import SourceHandles
from sevhop.keeper.paths import KeeperPaths
from sevhop.keeper.transit_state import TransitState
from sevhop.transit_keeper import restores
from sevhop.transit_keeper.ledger import Ledger
from sevhop.transit_keeper.restores import Restores
from sevhop.transit_keeper.watch import End
from sevhop_qmp import adopt
from sevhop_qmp.errors import MonitorClosed
from sevhop_qmp.process import QemuProcess

from .keeper_config import config


class Qemu:
    """A process; what is done to it is in its history."""

    def __init__(self, *, alive: bool = True, stubborn: int = 0) -> None:
        self.alive = alive
        self.stubborn = stubborn
        self.history: list[str] = []

    async def freeze(self, _: float) -> bool:
        self.history.append("halted" if not self.stubborn else "not halted")
        self.stubborn -= bool(self.stubborn)
        return self.history[-1] == "halted"

    def thaw(self) -> None:
        self.history.append("continued")

    def kill(self) -> None:
        self.alive = False
        self.history.append("killed")

    async def wait(self, _: float) -> bool:
        return not self.alive


class Attempt:
    """A restore whose destination has loaded the guest."""

    announced = ended_by_us = False

    def __init__(self, destination: Qemu, *, has_run: bool) -> None:
        self.destination = destination
        self.has_run = has_run
        self.port = self

    def revoke_start(self) -> bool:
        return False

    def close(self) -> None: ...


class Keeper:
    """The restores of a guest in the transit."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, transit: Qemu | None = None, left: bool = False, silent: int = 0
    ) -> None:
        self.transit = transit or Qemu()
        self.left = left
        self.silent = silent
        self.ended: list[str] = []
        self.completed = 0
        self.resumed = False
        monkeypatch.setattr(QemuProcess, "open", lambda _: self.transit)
        monkeypatch.setattr(restores, "_POLL", 0)
        monkeypatch.setattr(transit_move, "has_left", self._has_left)
        monkeypatch.setattr(transit_move, "complete", self._complete)
        monkeypatch.setattr(destination, "reach", self._reach)
        monkeypatch.setattr(adopt, "finish", self._finish)
        self.ledger = Ledger("/qemu")
        self.ledger.record.state = TransitState.HOPPING
        watch: Any = self
        handles = SourceHandles(100, {})
        self.restores = Restores(
            config(), KeeperPaths(Path("/nowhere")), handles, self.ledger, watch, self._restored, self._ended
        )
        monkeypatch.setattr(self.restores, "_resume", self._resume)

    async def undo(self, attempt: Attempt) -> None:
        """The hop has failed."""
        one: Any = attempt
        await self.restores._undo(one, "a test")

    async def connected(self) -> Keeper:
        if not self.transit.alive:
            raise MonitorClosed("it has exited")
        assert self.transit.history[-1] == "continued", "it can only answer then"
        if self.silent:
            self.silent -= 1
            raise MonitorClosed("it does not answer yet")
        return self

    async def _has_left(self, _: object) -> bool:
        return self.left

    async def _complete(self, *_: object) -> None:
        self.completed += 1

    async def _finish(self, _: object) -> None: ...

    async def _reach(self, *_: object) -> Keeper:
        return self

    async def __aenter__(self) -> Keeper:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def _resume(self) -> None:
        self.resumed = True

    async def _restored(self) -> None:
        self.ledger.enter(TransitState.OVER)

    async def _ended(self, end: End) -> None:
        self.ended.append(end.reason)


def in_move(keeper: Keeper) -> Keeper:
    keeper.ledger.record.moving = True
    return keeper


def test_guest_is_in_the_transit_if_its_context_was_not_about_to_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """The transit is not asked."""
    keeper = Keeper(monkeypatch, left=True)
    new = Qemu()
    asyncio.run(keeper.undo(Attempt(new, has_run=False)))
    assert (new.history, keeper.transit.history) == (["killed"], ["continued"])
    assert (keeper.resumed, keeper.ledger.record.state) == (True, TransitState.TRANSIT)


def test_guest_is_in_the_transit_as_long_as_the_context_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The destination is halted before the transit is asked: it could still move the context."""
    keeper = in_move(Keeper(monkeypatch, silent=2))
    new = Qemu(stubborn=2)
    asyncio.run(keeper.undo(Attempt(new, has_run=False)))
    assert new.history == ["not halted", "not halted", "halted", "killed"]
    assert (keeper.resumed, keeper.ledger.record.state) == (True, TransitState.TRANSIT)


def test_guest_is_in_the_destination_when_the_context_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it has not run there yet. What is in the transit never runs again."""
    keeper = in_move(Keeper(monkeypatch, left=True))
    new = Qemu()
    asyncio.run(keeper.undo(Attempt(new, has_run=False)))
    assert new.history == ["halted", "continued"]
    assert keeper.transit.history == ["continued", "killed"]
    assert (keeper.completed, keeper.resumed) == (1, False)
    assert (keeper.ledger.record.state, keeper.restores.arrived) == (TransitState.OVER, True)


@pytest.mark.parametrize("committed", [True, False])
def test_guest_that_has_run_in_the_destination_stays_there(monkeypatch: pytest.MonkeyPatch, committed: bool) -> None:
    """The move is not completed if it was completed."""
    keeper = in_move(Keeper(monkeypatch, left=True))
    keeper.ledger.record.committed = committed
    asyncio.run(keeper.undo(Attempt(Qemu(), has_run=True)))
    assert (keeper.completed, keeper.transit.history) == (int(not committed), ["killed"])
    assert keeper.ledger.record.state is TransitState.OVER


def test_guest_is_lost_with_the_destination_that_had_its_context(monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = in_move(Keeper(monkeypatch, left=True))
    asyncio.run(keeper.undo(Attempt(Qemu(alive=False), has_run=False)))
    assert keeper.ended == ["a test; its SEV context had been moved to the new QEMU, which has exited"]
    assert not keeper.resumed


def test_destination_gets_the_context_of_a_transit_that_has_exited(monkeypatch: pytest.MonkeyPatch) -> None:
    """The keeper has a descriptor of its VM."""
    keeper = in_move(Keeper(monkeypatch, transit=Qemu(alive=False)))
    asyncio.run(keeper.undo(Attempt(Qemu(), has_run=False)))
    assert (keeper.completed, keeper.ledger.record.state) == (1, TransitState.OVER)
