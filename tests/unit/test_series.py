"""Which domains of a series are tried when one of them does not arrive; the upgrades themselves are played."""

from __future__ import annotations

import asyncio

import pytest
from sevhop import series
from sevhop.errors import Lost, NeedsRecover, Refused, Undone
from sevhop.procedure import Report
from sevhop.upgrade import Options
from sevhop_qmp.errors import SevhopError

#: How the domains end, by name.
ENDS: dict[str, type[SevhopError]] = {"refused": Refused, "undone": Undone, "held": NeedsRecover, "lost": Lost}


class Upgrade:
    """An upgrade that ends as its domain's name says, or when it is interrupted."""

    def __init__(self, _uri: str, name: str, _options: Options, _progress: object) -> None:
        self.report = Report(guest=name)
        self._interrupted = asyncio.Event()

    async def run(self) -> None:
        if self.report.guest == "slow":
            await self._interrupted.wait()
        if self._interrupted.is_set():
            self.report.outcome = "undone"
            raise Undone("interrupted")
        error = ENDS.get(self.report.guest)
        self.report.outcome = self.report.guest if error else "done"
        if error:
            raise error(self.report.guest)

    def interrupt(self) -> bool:
        self._interrupted.set()
        return True


@pytest.fixture(autouse=True)
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(series, "Upgrade", Upgrade)


def run(*names: str, chosen: bool = False, keep_going: bool = False) -> tuple[list[str], str]:
    """The domains that were tried, and the summary."""
    errors: list[SevhopError | None] = []
    hops = series.Series(
        "", names, Options(), chosen=chosen, keep_going=keep_going, ended=lambda _, error: errors.append(error)
    )
    asyncio.run(hops.run())
    tried = [hop.report.guest for hop in hops.upgrades]
    assert [type(error) if error else None for error in errors] == [ENDS.get(name) for name in tried]
    return tried, hops.summary()


def test_all_arrive() -> None:
    assert run("a", "b", "c") == (["a", "b", "c"], "3 domains: 3 done")


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("chosen", [True, False])
def test_one_does_not_arrive(end: str, chosen: bool) -> None:
    goes_on = chosen and end == "refused"
    tried, summary = run("a", end, "b", chosen=chosen)
    assert tried == (["a", end, "b"] if goes_on else ["a", end])
    assert summary == f"3 domains: 2 done, 1 {end}" if goes_on else f"3 domains: 1 done, 1 {end}, 1 not tried"
    assert run("a", end, "b", chosen=chosen, keep_going=True)[0] == ["a", end, "b"]


def test_an_interruption_ends_the_series_whatever_was_asked_for() -> None:
    hops = series.Series("", ["a", "slow", "b"], Options(), chosen=True, keep_going=True)

    async def interrupted() -> None:
        running = asyncio.ensure_future(hops.run())
        while len(hops.upgrades) < 2:
            await asyncio.sleep(0)
        assert hops.interrupt()
        await running

    asyncio.run(interrupted())
    assert [hop.report.outcome for hop in hops.upgrades] == ["done", "undone"]
    assert hops.summary() == "3 domains: 1 done, 1 undone, 1 not tried"
