"""Which domains of a fleet are tried when one of them does not arrive; the upgrades themselves are played."""

from __future__ import annotations

import asyncio

import pytest
from sevhop.engine import fleet
from sevhop.engine.fleet import Fleet
from sevhop.engine.upgrade import Options
from sevhop.errors import Interrupted, Lost, NeedsRecover, Refused, Undone
from sevhop.events import Chosen, Ended, Event, Listener
from sevhop.report import Report
from sevhop_qmp.errors import SevhopError

#: How the domains end, by name.
ENDS: dict[str, type[SevhopError]] = {"refused": Refused, "undone": Undone, "held": NeedsRecover, "lost": Lost}


class Upgrade:
    """An upgrade that ends as its domain's name says, or, if that begins with ``slow``, when it is interrupted."""

    under_way = 0
    most = 0

    def __init__(self, _uri: str, name: str, _options: Options, listener: Listener) -> None:
        self.report = Report(guest=name)
        self._listener = listener
        self._interrupted = asyncio.Event()

    async def run(self) -> None:
        Upgrade.under_way += 1
        Upgrade.most = max(Upgrade.most, Upgrade.under_way)
        try:
            await self._run()
        finally:
            Upgrade.under_way -= 1
            self._listener(Ended(self.report.guest, self.report))

    async def _run(self) -> None:
        if self.report.guest.startswith("slow"):
            await self._interrupted.wait()
        await asyncio.sleep(0)
        if self._interrupted.is_set():
            self.report.outcome = "undone"
            raise Interrupted("interrupted")
        if self.report.guest == "bug":
            raise ZeroDivisionError
        error = ENDS.get(self.report.guest)
        self.report.outcome = self.report.guest if error else "done"
        if error:
            raise error(self.report.guest)

    def interrupt(self) -> bool:
        self._interrupted.set()
        return True


@pytest.fixture(autouse=True)
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    Upgrade.most = 0
    monkeypatch.setattr(fleet, "Upgrade", Upgrade)


def run(*names: str, chosen: bool = False, keep_going: bool = False, jobs: int = 1) -> list[str]:
    """The domains that were tried."""
    events: list[Event] = []
    one = Fleet("", names, Options(), chosen=chosen, keep_going=keep_going, jobs=jobs, listener=events.append)
    asyncio.run(one.run())
    begun = [upgrade.report.guest for upgrade in one.upgrades]
    first, *rest = events
    assert isinstance(first, Chosen) and first.domains == names
    assert sorted(event.guest for event in rest if isinstance(event, Ended)) == sorted(begun)
    return begun


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_all_arrive(jobs: int) -> None:
    assert run("a", "b", "c", jobs=jobs) == ["a", "b", "c"]
    assert Upgrade.most == min(jobs, 3)


def test_none_at_all() -> None:
    assert run() == []


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("chosen", [True, False])
def test_one_does_not_arrive(end: str, chosen: bool) -> None:
    goes_on = chosen and end == "refused"
    assert run("a", end, "b", chosen=chosen) == (["a", end, "b"] if goes_on else ["a", end])
    assert run("a", end, "b", chosen=chosen, keep_going=True) == ["a", end, "b"]


def test_a_failure_does_not_stop_those_under_way() -> None:
    assert run("undone", "a", "b", jobs=2) == ["undone", "a"]
    assert run("undone", "a", "b", jobs=2, keep_going=True) == ["undone", "a", "b"]


def test_a_bug_does_not_stop_those_under_way() -> None:
    one = Fleet("", ["bug", "a", "b"], Options(), jobs=2, keep_going=True)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(one.run())
    assert [upgrade.report.outcome for upgrade in one.upgrades] == ["", "done"]


def test_one_domain_is_not_upgraded_twice() -> None:
    one = Fleet("", ["a", "b", "a"], Options(), jobs=3)
    asyncio.run(one.run())
    assert [upgrade.report.guest for upgrade in one.upgrades] == ["a", "b"]


@pytest.mark.parametrize(("jobs", "begun"), [(1, 2), (3, 4)])
def test_an_interruption_undoes_all_that_are_under_way(jobs: int, begun: int) -> None:
    one = Fleet("", ["a", "slow", "slower", "slowest", "b"], Options(), chosen=True, keep_going=True, jobs=jobs)

    async def interrupted() -> None:
        running = asyncio.ensure_future(one.run())
        while len(one.upgrades) < begun:
            await asyncio.sleep(0)
        assert one.interrupt()
        await running

    with pytest.raises(Interrupted):
        asyncio.run(interrupted())
    assert [upgrade.report.outcome for upgrade in one.upgrades] == ["done", *["undone"] * (begun - 1)]
