"""What the typed calls make of a destination's answers. What adopt.so answers is tested with real QEMUs."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, cast

import pytest
from sevhop_qmp import adopt
from sevhop_qmp.errors import MonitorError
from sevhop_qmp.monitor import Monitor

#: The answer to x-sev-adopt-status of a library that announces nothing.
STATUS = {
    "context": "none",
    "source": "running",
    "ram": "private",
    "moved": False,
    "ran": False,
    "finished": False,
    "emulated-launch-commands": 0,
    "deferred-regions": 0,
    "refused-starts": 0,
    "vm-type": 0,
    "vcpus": 1,
    "deferred-registers": 0,
    "protected-state-offset": 0,
    "listeners": 0,
    "memfds": [],
}


class FakeDestination:
    """Has one answer."""

    name = "destination"

    def __init__(self, answer: Mapping[str, object]) -> None:
        self.answer = answer
        self.commands: list[str] = []

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        assert not arguments
        self.commands.append(command)
        return dict(self.answer)


def announce(destination: FakeDestination) -> adopt.Announcement:
    return asyncio.run(adopt.announce(cast(Monitor, destination)))


def status(answer: Mapping[str, object]) -> adopt.AdoptStatus:
    return asyncio.run(adopt.adopt_status(cast(Monitor, FakeDestination(answer))))


@pytest.mark.parametrize("missing", ["", "cont"])
def test_announcement_has_what_a_qemu_lacks(missing: str) -> None:
    destination = FakeDestination({"announced": not missing, "missing": missing})
    assert announce(destination) == adopt.Announcement(not missing, missing)
    assert destination.commands == ["x-sev-adopt-announce"]


def test_announcement_is_refused_if_the_answer_is_invalid() -> None:
    with pytest.raises(MonitorError, match="invalid answer from QEMU"):
        announce(FakeDestination({"announced": True}))


def test_status_has_what_clients_were_informed_of() -> None:
    answered = status({**STATUS, "announced": "running", "deferred-tap-settings": 3})
    assert (answered.announced, answered.deferred_tap_settings) == ("running", 3)


def test_status_of_an_earlier_library_is_accepted() -> None:
    """A package may be updated between the start of a destination and its recovery."""
    answered = status(STATUS)
    assert (answered.announced, answered.deferred_tap_settings) == ("none", 0)
