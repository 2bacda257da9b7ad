"""Terminating the source of an upgrade: what is known of the guest if the keeper does not report that it did."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from sevhop import events
from sevhop.engine import upgrade_save
from sevhop.engine.transaction import CommitState, Transaction
from sevhop.errors import GuestState
from sevhop.keeper.config import KeeperError, KeeperTimeout
from sevhop.keeper.state import State
from sevhop.libvirt import domain_xml
from sevhop.options import UpgradeOptions
from sevhop_qmp import stream_sockets


class Anything:
    """Has the attributes that it is given, and coroutine functions that do nothing."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__ |= attributes

    def __getattr__(self, name: str) -> Any:
        async def nothing(*_: object) -> None: ...

        return nothing


class Keeper:
    """One whose reply to ``retire`` is an error."""

    image = "/run/sevhop/image"

    def __init__(self, error: KeeperError, state: State | KeeperError) -> None:
        self._error = error
        self._state = state

    async def retire(self) -> None:
        raise self._error

    async def status(self) -> dict[str, str]:
        if isinstance(self._state, KeeperError):
            raise self._state
        return {"state": self._state.value}


class Terminating(Transaction):
    """An upgrade in the phase terminate."""

    async def _script(self) -> None: ...


@pytest.mark.parametrize(
    ("error", "state", "alive", "then", "guest"),
    [
        # The keeper has not touched it: the guest is resumed.
        (KeeperError("refused"), State.HELD, True, CommitState.UNDOABLE, GuestState.UNKNOWN),
        # A keeper that is gone kills nobody any more.
        (KeeperError("gone"), KeeperError("gone"), True, CommitState.UNDOABLE, GuestState.UNKNOWN),
        # SIGKILL is pending: the source is in uninterruptible sleep.
        (KeeperTimeout("no reply"), State.RETIRING, True, CommitState.COMMITTED, GuestState.UNKNOWN),
        (KeeperTimeout("no reply"), KeeperTimeout("no reply"), True, CommitState.COMMITTED, GuestState.UNKNOWN),
        (KeeperTimeout("no reply"), State.WAITING, False, CommitState.COMMITTED, GuestState.SUSPENDED),
    ],
)
def test_source_that_may_be_killed_is_not_resumed(
    error: KeeperError,
    state: State | KeeperError,
    alive: bool,
    then: CommitState,
    guest: GuestState,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def nothing(*_: object) -> None: ...

    monkeypatch.setattr(upgrade_save, "verify_stopped", nothing)
    monkeypatch.setattr(stream_sockets, "connections", lambda *_: [])
    monkeypatch.setattr(domain_xml, "without_additions", lambda xml: xml)
    checked: Any = Anything(source=Anything(alive=alive), domain=Anything(name="web1"), monitor=None, xml=None)
    prepared: Any = Anything(disks=Anything())
    stopped: Any = Anything(state="paused")
    keeper: Any = Keeper(error, state)
    hop = Terminating("guest", events.ignore)
    with contextlib.suppress(KeeperError):
        asyncio.run(upgrade_save.terminate(hop, UpgradeOptions(), checked, keeper, prepared, stopped))
    assert (hop.state, hop.committed_state) == (then, guest)
