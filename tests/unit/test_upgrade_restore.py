"""Ending a destination that libvirt has started and that does not run in time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from sevhop.engine import upgrade_restore
from sevhop.keeper.config import KeeperError, KeeperTimeout
from sevhop.keeper.state import State
from sevhop.libvirt.daemon import DomainError
from sevhop_qmp.errors import SevhopError

PID = 1 << 30
"""Of no process."""


class Keeper:
    """
    One that revokes the start.

    :ivar errors: its replies to ``revoke`` before.
    :ivar state: what it reports.
    """

    def __init__(self, *errors: KeeperError, state: State = State.WAITING, started: bool = True) -> None:
        self.timeout = 0.2
        self.state = state
        self.errors = list(errors)
        self._started = started

    async def revoke(self) -> None:
        if self.errors:
            raise self.errors.pop(0)

    async def status(self) -> dict[str, str]:
        return {"state": self.state.value}

    def has_started(self, _: int) -> bool:
        return self._started


class Domain:
    """
    :ivar pids: what is found one after the other.
    :ivar destroyed: whether it was.
    """

    name = "web1"

    def __init__(self, *pids: int | DomainError | None) -> None:
        self._pids = iter(pids)
        self.destroyed = False

    def living_pid(self) -> int | None:
        pid = next(self._pids)
        if isinstance(pid, DomainError):
            raise pid
        return pid

    async def destroy(self) -> None:
        self.destroyed = True


def end(domain: Domain | None, keeper: Keeper) -> bool:
    class Connection:
        async def domain_with(self, _: str) -> Domain | None:
            return domain

    connection: Any = Connection()
    client: Any = keeper
    return asyncio.run(upgrade_restore.end_hanging_destination(connection, "uuid", client))


@pytest.fixture(autouse=True)
def short_polls(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(upgrade_restore, "_POLL", 0.001)
    yield


@pytest.mark.parametrize(
    "pids", [(PID,), (None,), (DomainError("no pid file"),)], ids=["alive", "exited", "not started yet"]
)
def test_destination_that_hangs_is_destroyed(pids: tuple[int | DomainError | None]) -> None:
    domain = Domain(*pids)
    assert not end(domain, Keeper())
    assert domain.destroyed


def test_qemu_that_the_hop_has_not_started_is_left_alone() -> None:
    domain = Domain(PID, PID)
    with pytest.raises(SevhopError, match=f"process {PID} runs domain web1, and was not started by this hop"):
        end(domain, Keeper(started=False))
    assert not domain.destroyed


def test_destination_that_exits_meanwhile_is_not_taken_for_anothers() -> None:
    """It has no environment any more, by which it is recognized."""
    domain = Domain(PID, None)
    assert not end(domain, Keeper(started=False))
    assert domain.destroyed


def test_destination_that_has_the_guest_is_left_alone() -> None:
    domain = Domain(PID)
    assert end(domain, Keeper(KeeperError("it has run"), state=State.OVER))
    assert not domain.destroyed


def test_commit_in_progress_is_waited_for() -> None:
    domain = Domain(PID)
    assert not end(domain, Keeper(KeeperError("committing"), state=State.RESTORING))
    assert domain.destroyed


def test_destination_is_left_alone_if_its_start_cannot_be_revoked() -> None:
    domain = Domain(PID)
    with pytest.raises(KeeperError, match="committing"):
        end(domain, Keeper(*[KeeperError("committing")] * 1000, state=State.COMMITTED))
    assert not domain.destroyed


def test_destination_is_left_alone_if_the_keeper_hangs() -> None:
    """It has been waited for already."""
    domain, keeper = Domain(PID), Keeper(*[KeeperTimeout("no reply")] * 2)
    with pytest.raises(KeeperTimeout):
        end(domain, keeper)
    assert len(keeper.errors) == 1
    assert not domain.destroyed


def test_domain_that_is_gone_need_not_be_destroyed() -> None:
    assert not end(None, Keeper())
