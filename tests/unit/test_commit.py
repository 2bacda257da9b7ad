"""After the commit there is no rollback: a destination that fails is replaced by another one, as often as it takes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from typing import Any

import pytest
from sevhop import events
from sevhop.engine import commit as phase
from sevhop.engine.start import Started
from sevhop.engine.transaction import CommitState, Transaction
from sevhop.errors import GuestLost, GuestState, RecoveryRequired
from sevhop.guest import inspection, runtime_settings
from sevhop.guest.inspection import SevContext
from sevhop.guest.runtime_settings import Settings
from sevhop.options import HopOptions
from sevhop_qmp import ram_block_sync
from sevhop_qmp.errors import MonitorClosed, MoveError, MoveUncertain, SevhopError
from sevhop_qmp.move import MoveReport
from sevhop_qmp.run_mark import RunState

from .inspected_guest import guest

SOURCE_VM = 100
SEV = SevContext("sev")


class Anything:
    """Has the attributes that it was given."""

    def __init__(self, **attributes: object) -> None:
        vars(self).update(attributes)


class Process:
    """Of a destination that has never run the guest."""

    pid = 4711
    alive = True

    async def freeze(self, _: float) -> bool:
        return True


class Destination:
    """Counts how often it was killed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.killed = 0
        self.monitor = self
        self.process = Process()

    async def kill(self) -> None:
        self.killed += 1


class Incoming:
    """Loads everything."""

    image = b""

    async def write(self, _: bytes) -> None: ...

    def end(self) -> None: ...

    async def loaded(self, *, timeout: float) -> None: ...


def started(name: str, vm: int) -> Any:
    return Started(Destination(name), None, Incoming(), vm)  # type: ignore[arg-type]


class Committed(Transaction):
    """A hop whose SEV context moves as a test decides."""

    def __init__(self, patch: pytest.MonkeyPatch, destinations: list[Any], context: int) -> None:
        super().__init__("guest", events.ignore)
        self.context = context  # the VM that has it
        self.moves: list[tuple[str, int]] = []
        self.destinations = destinations
        self.actions: list[dict[str, str]] = []
        self.downtime.begin()
        patch.setattr(phase, "start_destination", self._start)
        patch.setattr(phase, "_move", self._move)
        patch.setattr(phase, "verify_not_resumed", self._nothing)
        patch.setattr(phase, "_schedule_again", self._nothing)
        patch.setattr(runtime_settings, "read", self._nothing)
        patch.setattr(runtime_settings, "carry_over", self._carry_over)
        patch.setattr(inspection, "inspect", self._inspect)
        patch.setattr(ram_block_sync, "write", lambda *_: None)

    async def _script(self) -> None: ...

    async def _nothing(self, *_: object) -> None: ...

    async def _carry_over(self, ours: Settings, *_: object) -> None:
        self.actions.append(ours.actions)

    async def _inspect(self, *_: object) -> Anything:
        return Anything(blocks={})

    async def _start(self, *_: object) -> Any:
        return self.destinations.pop(0)

    async def _move(self, hop: object, options: object, to: Any, *, source_vm_fd: int) -> MoveReport:
        self.moves.append((to.destination.name, source_vm_fd))
        if source_vm_fd != self.context:
            raise MoveError("no context", errno.EINVAL)
        self.context = to.vm
        if len(self.moves) == 1 and to.destination.name == "first":
            raise MoveUncertain("it exited meanwhile")
        return MoveReport(1, 0, 0.0)


@pytest.fixture
def checked() -> Any:
    return Anything(has_context=True, autostart=False, source=Anything(kill=lambda: None), guest=guest(context=SEV))


def prepared(first: Any) -> Any:
    return Anything(
        started=first,
        arguments=None,
        run_mark=Anything(read=lambda: RunState.NOT),
        transfer=Anything(image=b""),
        settings=Settings(),
        ram=Anything(copies=list),
    )


ACQUIRED: Any = Anything(handles=Anything(source_vm_fd=SOURCE_VM))
STOPPED: Any = Anything(boost=Anything(reset=lambda: None, reset_all=lambda: None))
OPTIONS = HopOptions()


def test_guest_survives_two_destinations_that_fail(checked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first exits during the move, the second does not run the guest: the context is in the second's VM then."""
    names: list[Any] = [started("first", 1), started("second", 2), started("third", 3)]
    first, second, third = names
    hop = Committed(monkeypatch, [second, third], SOURCE_VM)

    async def resume_guest(monitor: Destination) -> None:
        if monitor is not third.destination:
            raise MonitorClosed("it exited")

    monkeypatch.setattr(phase, "resume_guest", resume_guest)

    async def both() -> Started:
        now = await phase.commit(hop, OPTIONS, checked, ACQUIRED, prepared(first), STOPPED)
        assert now is second
        return await phase.resume(hop, OPTIONS, checked, ACQUIRED, prepared(first), STOPPED, now)

    assert asyncio.run(both()) is third
    assert hop.moves == [("first", 100), ("second", 100), ("second", 1), ("third", 100), ("third", 2)]
    assert [one.destination.killed for one in names] == [1, 1, 0]
    assert hop.committed_state is GuestState.RUNNING_IN_NEW
    assert hop.actions == [{"reboot": "shutdown"}] * 2, "its firmware is private"


def test_guest_is_lost_if_no_destination_gets_the_context(checked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = started("first", 1), started("second", 2)
    hop = Committed(monkeypatch, [second], 77)

    async def lost() -> None:
        with contextlib.suppress(MoveError):
            await phase.commit(hop, OPTIONS, checked, ACQUIRED, prepared(first), STOPPED)
        hop.commit(GuestState.UNKNOWN)
        error = MonitorClosed("it exited")
        await phase._retry_in_new_destination(hop, OPTIONS, checked, ACQUIRED, prepared(first), first, error)

    with pytest.raises(GuestLost, match="another new QEMU failed as well"):
        asyncio.run(lost())
    assert second.destination.killed == 1


def test_guest_is_not_lost_if_the_source_may_have_the_context(checked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows how the first move went, and there is no other destination to try it in."""
    first = started("first", 1)
    hop = Committed(monkeypatch, [], SOURCE_VM)

    async def start(*_: object) -> Started:
        raise SevhopError("it does not start")

    monkeypatch.setattr(phase, "start_destination", start)
    with pytest.raises(RecoveryRequired, match="another new QEMU failed as well") as caught:
        asyncio.run(phase.commit(hop, OPTIONS, checked, ACQUIRED, prepared(first), STOPPED))
    assert caught.value.guest_state is GuestState.UNKNOWN


def test_guest_is_not_lost_if_the_failed_destination_cannot_be_killed(
    checked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The context may be there."""
    first = started("first", 1)
    hop = Committed(monkeypatch, [], SOURCE_VM)

    async def kill() -> None:
        raise SevhopError("cannot kill it")

    first.destination.kill = kill
    with pytest.raises(SevhopError, match="cannot kill it") as caught:
        asyncio.run(phase.commit(hop, OPTIONS, checked, ACQUIRED, prepared(first), STOPPED))
    assert not isinstance(caught.value, GuestLost)
    assert hop.state is CommitState.COMMITTED
