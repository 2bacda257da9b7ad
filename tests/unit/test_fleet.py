"""Which domains of a fleet are tried after the failure of one of them; the upgrades are simulated."""

from __future__ import annotations

import asyncio

import pytest
from sevhop.engine import fleet
from sevhop.engine.fleet import Fleet, Selection
from sevhop.errors import GuestLost, Interrupted, RecoveryRequired, Refused, RolledBack
from sevhop.events import DomainsSelected, Event, HopFinished, Listener, WindowClosed
from sevhop.options import UpgradeOptions, Window
from sevhop.process import host_memory
from sevhop.report import Report
from sevhop_qmp.errors import SevhopError

#: Failures of the domains, by name.
FAILURES: dict[str, type[SevhopError]] = {
    "refused": Refused,
    "rolled-back": RolledBack,
    "recovery-required": RecoveryRequired,
    "guest-lost": GuestLost,
    "recovery-required again": RecoveryRequired,
    "guest-lost again": GuestLost,
}
NEEDS_PERSON = {name for name, error in FAILURES.items() if error in (RecoveryRequired, GuestLost)}


class Upgrade:
    """An upgrade with the outcome that its domain is named after; ``slow`` ones run until they are interrupted."""

    running = 0
    most = 0

    def __init__(self, _uri: str, name: str, _options: UpgradeOptions, listener: Listener) -> None:
        self.report = Report(guest=name)
        self._listener = listener
        self._interrupted = asyncio.Event()

    async def run(self) -> None:
        Upgrade.running += 1
        Upgrade.most = max(Upgrade.most, Upgrade.running)
        try:
            await self._run()
        finally:
            Upgrade.running -= 1
            self._listener(HopFinished(self.report.guest, self.report))

    async def _run(self) -> None:
        if self.report.guest.startswith("slow"):
            await self._interrupted.wait()
        await asyncio.sleep(0)
        if self._interrupted.is_set():
            self.report.outcome = "rolled-back"
            raise Interrupted("interrupted")
        if self.report.guest == "bug":
            raise ZeroDivisionError
        error = FAILURES.get(self.report.guest)
        self.report.outcome = self.report.guest if error else "done"
        if error:
            raise error(self.report.guest)

    def interrupt(self) -> bool:
        self._interrupted.set()
        return True


@pytest.fixture(autouse=True)
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    Upgrade.most = 0
    monkeypatch.setattr(fleet, "Upgrade", Upgrade)


def run(
    *names: str, by_rule: bool = False, keep_going: bool = False, jobs: int = 1, max_failures: int = 1
) -> list[str]:
    """The domains that were tried."""
    events: list[Event] = []
    selection = Selection(names, by_rule, ("excluded",))
    one = Fleet(
        "",
        selection,
        UpgradeOptions(),
        keep_going=keep_going,
        jobs=jobs,
        max_failures=max_failures,
        listener=events.append,
    )
    asyncio.run(one.run())
    begun = [upgrade.report.guest for upgrade in one.upgrades]
    first, *rest = events
    assert isinstance(first, DomainsSelected)
    assert (first.domains, first.excluded) == (names, ("excluded",))
    assert sorted(event.guest for event in rest if isinstance(event, HopFinished)) == sorted(begun)
    return begun


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_fleet_upgrades_all_domains(jobs: int) -> None:
    assert run("a", "b", "c", jobs=jobs) == ["a", "b", "c"]
    assert Upgrade.most == min(jobs, 3)


@pytest.mark.parametrize("room", [0, 1, 2, 9])
def test_no_more_upgrades_are_in_progress_than_there_is_memory_for(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """Nobody waits for ever: the first one begins in any case."""
    monkeypatch.setattr(host_memory, "has_room", lambda upgrades: upgrades <= room)
    assert run("a", "b", "c", jobs=3) == ["a", "b", "c"]
    assert Upgrade.most == min(max(room, 1), 3)


@pytest.mark.parametrize("jobs", [1, 2])
def test_no_upgrade_begins_outside_the_window(monkeypatch: pytest.MonkeyPatch, jobs: int) -> None:
    """Those that have begun are completed."""
    opened = iter([True] * 2 + [False] * 9)
    monkeypatch.setattr(Window, "is_open", lambda self: next(opened))
    events: list[Event] = []
    window = Window.parse("01:00-05:00")
    one = Fleet("", Selection(("a", "b", "c", "d")), UpgradeOptions(), jobs=jobs, window=window, listener=events.append)
    asyncio.run(one.run())
    assert [upgrade.report.outcome for upgrade in one.upgrades] == ["done", "done"]
    (closed,) = [event for event in events if isinstance(event, WindowClosed)]
    assert (closed.window, closed.domains) == ("01:00-05:00", ("c", "d"))


def test_fleet_without_domains_upgrades_nothing() -> None:
    assert run() == []


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("by_rule", [True, False])
def test_failure_stops_the_fleet_unless_skipped(failure: str, by_rule: bool) -> None:
    skipped = by_rule and failure == "refused"
    assert run("a", failure, "b", by_rule=by_rule) == (["a", failure, "b"] if skipped else ["a", failure])
    goes_on = failure not in NEEDS_PERSON
    assert run("a", failure, "b", by_rule=by_rule, keep_going=True) == ["a", failure, *(["b"] if goes_on else [])]


@pytest.mark.parametrize("failure", ["recovery-required", "guest-lost"])
def test_guests_that_need_a_person_stop_the_fleet_when_they_are_too_many(failure: str) -> None:
    names = ("a", failure, "b", f"{failure} again", "c")
    assert run(*names, keep_going=True, max_failures=2) == list(names[:4])
    assert run(*names, keep_going=True, max_failures=3) == list(names)
    assert run(*names, max_failures=3) == ["a", failure], "only those who want to go on"


def test_failure_does_not_stop_upgrades_in_progress() -> None:
    assert run("rolled-back", "a", "b", jobs=2) == ["rolled-back", "a"]
    assert run("rolled-back", "a", "b", jobs=2, keep_going=True) == ["rolled-back", "a", "b"]


def test_bug_does_not_stop_upgrades_in_progress() -> None:
    one = Fleet("", Selection(("bug", "a", "b")), UpgradeOptions(), jobs=2, keep_going=True)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(one.run())
    assert [upgrade.report.outcome for upgrade in one.upgrades] == ["", "done"]


@pytest.mark.parametrize(("jobs", "begun"), [(1, 2), (3, 4)])
def test_interruption_rolls_back_all_in_progress(jobs: int, begun: int) -> None:
    selection = Selection(("a", "slow", "slower", "slowest", "b"), by_rule=True)
    one = Fleet("", selection, UpgradeOptions(), keep_going=True, jobs=jobs)

    async def interrupted() -> None:
        running = asyncio.ensure_future(one.run())
        while len(one.upgrades) < begun:
            await asyncio.sleep(0)
        assert one.interrupt()
        await running

    with pytest.raises(Interrupted):
        asyncio.run(interrupted())
    assert [upgrade.report.outcome for upgrade in one.upgrades] == ["done", *["rolled-back"] * (begun - 1)]
