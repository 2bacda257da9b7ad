"""The move of an SEV context out of a transit."""

from __future__ import annotations

import asyncio
import errno
from dataclasses import dataclass
from typing import Any

import pytest
from sevhop import events
from sevhop.engine import transit_move
from sevhop.engine.transaction import CommitState, Transaction
from sevhop.errors import GuestState, RecoveryRequired, RolledBack
from sevhop.options import HopOptions
from sevhop_qmp import adopt, move
from sevhop_qmp.errors import MoveError, MoveUncertain
from sevhop_qmp.move import MoveReport


class Anything:
    """Has the attributes that it was given."""

    def __init__(self, **attributes: object) -> None:
        vars(self).update(attributes)


class Moving(Transaction):
    """A hop that is nothing but the move."""

    def __init__(self) -> None:
        super().__init__("guest", events.ignore)
        self.undone = 0
        self.moved = 0
        self.rollback.push(self._undo)

    def _undo(self) -> None:
        self.undone += 1

    def _moved(self) -> None:
        self.moved += 1

    async def _script(self) -> None:
        process = Anything(pid=4711)
        prepared: Any = Anything(started=Anything(destination=Anything(monitor=None, process=process)))
        stopped: Any = Anything(boost=Anything(reset_all=lambda: None))
        await transit_move.move_out(self, HopOptions(), prepared, stopped, 100, self._moved)


def moves(monkeypatch: pytest.MonkeyPatch, result: MoveReport | Exception) -> None:
    async def one(*_: object, **__: object) -> MoveReport:
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(move, "move", one)


def test_move_is_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    moves(monkeypatch, MoveReport(1, 0, 0.0))
    hop = Moving()
    asyncio.run(hop.run())
    assert (hop.undone, hop.moved, hop.state) == (0, 1, CommitState.COMMITTED)


def test_move_that_the_kernel_refuses_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    moves(monkeypatch, MoveError("the kernel did not move it", errno.EBUSY))
    hop = Moving()
    with pytest.raises(RolledBack, match="the kernel did not move it"):
        asyncio.run(hop.run())
    assert (hop.undone, hop.moved) == (1, 0)


def test_nothing_is_rolled_back_as_long_as_it_is_unknown_where_the_context_is(monkeypatch: pytest.MonkeyPatch) -> None:
    moves(monkeypatch, MoveUncertain("it has exited"))
    hop = Moving()
    with pytest.raises(RecoveryRequired, match="may have been moved") as caught:
        asyncio.run(hop.run())
    assert caught.value.guest_state is GuestState.UNKNOWN
    assert (hop.undone, hop.moved) == (0, 0)


def test_guest_whose_registers_cannot_be_set_is_in_the_destination(monkeypatch: pytest.MonkeyPatch) -> None:
    moves(monkeypatch, MoveReport(1, 0, 0.0, restore_errno=errno.EINVAL))
    hop = Moving()
    with pytest.raises(RecoveryRequired, match="registers could not be set") as caught:
        asyncio.run(hop.run())
    assert caught.value.guest_state is GuestState.PAUSED_IN_NEW
    assert (hop.undone, hop.moved) == (0, 1)


@dataclass
class Destination:
    """What adopt.so in it reports, and what it is ordered to do."""

    context: str = "sev"
    moved: bool = False
    ran: bool = False
    finished: bool = False
    announced: str = "running"
    runs_at_move: bool = True
    resumed: int = 0

    def complete(self, monkeypatch: pytest.MonkeyPatch, vm: int | None) -> Destination:
        """Complete an interrupted move into it."""
        here: Any = self

        async def status(_: object) -> object:
            return self

        async def do_move(monitor: object, pid: int, source: int, *, deadline: float) -> MoveReport:
            assert (source, self.moved) == (100, False)
            self.moved = True
            self.ran = self.runs_at_move and self.announced == "running"
            return MoveReport(1, 0, 0.0)

        async def resume(_: object) -> None:
            self.resumed += 1

        monkeypatch.setattr(adopt, "adopt_status", status)
        monkeypatch.setattr(move, "move", do_move)
        monkeypatch.setattr(transit_move, "resume_guest", resume)
        process: Any = Anything(pid=4711)
        asyncio.run(transit_move.complete(here, process, vm, 2.0))
        return self


def test_interrupted_move_is_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The destination runs the guest with the move, or is ordered to, or clients do not want it to run."""
    found = Destination().complete(monkeypatch, 100)
    assert (found.moved, found.ran, found.resumed) == (True, True, 0)
    assert Destination(runs_at_move=False).complete(monkeypatch, 100).resumed == 1
    assert Destination(announced="paused").complete(monkeypatch, 100).resumed == 0
    assert Destination(moved=True).complete(monkeypatch, None).resumed == 1
    assert Destination(moved=True, ran=True).complete(monkeypatch, None).resumed == 0
    assert Destination(moved=True, finished=True).complete(monkeypatch, None).resumed == 0


def test_guest_without_context_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Destination(context="none").complete(monkeypatch, None)
    assert (found.moved, found.resumed) == (False, 0)


def test_lost_context_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(transit_move.ContextLost, match="lost with the transit"):
        Destination().complete(monkeypatch, None)
