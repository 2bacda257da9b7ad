"""What is reported when libvirt cannot restore a domain whose guest runs in the transit."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from sevhop.engine.transit_restore import restore_from_transit
from sevhop.errors import GuestState, RecoveryRequired
from sevhop.libvirt.daemon import DomainError

TRANSIT = SimpleNamespace(name="web 1", uuid="4711", new="/new", old="/old", only_new=False, step_timeout=1.0)


class FakeKeeper:
    image = Path("/run/sevhop/0/image")
    emulator = ""

    async def status(self) -> dict[str, str]:
        return {"state": "transit", "reason": ""}

    async def use(self, emulator: str) -> None:
        self.emulator = emulator


class FakeConnection:
    """A daemon that restores nothing, for the reason of each emulator."""

    def __init__(self, keeper: FakeKeeper, reasons: dict[str, str]) -> None:
        self.keeper = keeper
        self.reasons = reasons

    async def domain_with(self, uuid: str) -> None:
        return None

    async def reconnect(self) -> bool:
        return False

    async def restore(self, image: str, timeout: float) -> None:
        raise DomainError(self.reasons[self.keeper.emulator])


@pytest.mark.parametrize(
    ("new", "old", "reason"),
    [
        ("web.iso: No such file", "web.iso: No such file", "/new and /old: web.iso: No such file"),
        ("no such machine type", "web.iso: No such file", "/new: no such machine type; /old: web.iso: No such file"),
    ],
)
def test_reason_is_reported_once_with_the_command_for_this_guest(new: str, old: str, reason: str) -> None:
    keeper = FakeKeeper()
    connection = FakeConnection(keeper, {"/new": new, "/old": old})
    with pytest.raises(RecoveryRequired) as raised:
        asyncio.run(restore_from_transit(*cast(Any, (connection, TRANSIT, keeper))))
    assert raised.value.message == f"libvirt cannot restore the domain: {reason}"
    assert raised.value.hint == f"when that is corrected, run: sevhop recover 'web 1', or virsh restore {keeper.image}"
    assert raised.value.guest_state is GuestState.IN_TRANSIT
