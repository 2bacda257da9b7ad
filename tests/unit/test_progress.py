"""What is drawn of hops that are played."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from sevhop.cli.progress import Picture
from sevhop.events import Chosen, Ended, Event, GuestRuns, GuestStopped, PhaseBegan, PhaseEnded
from sevhop.report import Report


def hop(guest: str, *, outcome: str = "done") -> list[Event]:
    """A hop with a rehearsal of 20 ms, and a blackout of 100 ms: 25 to freeze, 75 to restore."""
    return [
        PhaseBegan(guest, "rehearse", at=1.0),
        GuestStopped(guest, at=1.1),
        GuestRuns(guest, 20.0, at=1.12),
        PhaseEnded(guest, "rehearse", 200.0, at=1.2),
        PhaseBegan(guest, "freeze", at=1.99),
        GuestStopped(guest, at=2.0),
        PhaseEnded(guest, "freeze", 35.0, at=2.025),
        PhaseBegan(guest, "restore", at=2.025),
        GuestRuns(guest, 100.0, at=2.1),
        PhaseEnded(guest, "restore", 475.0, at=2.5),
        PhaseBegan(guest, "define", at=2.5),
        PhaseEnded(guest, "define", 1.0, at=2.501),
        Ended(guest, Report(guest, outcome=outcome)),
    ]


def drawn(*events: Event, terminal: bool = False) -> str:
    """All that is written, to a terminal or as it would stay on one."""
    out = io.StringIO()
    with Picture(Console(file=out, force_terminal=terminal, width=100, color_system=None)) as picture:
        for event in events:
            picture(event)
    return out.getvalue()


def test_the_blackout_stays() -> None:
    bar, legend = (line.strip() for line in drawn(*hop("web")).splitlines() if line.strip())
    assert bar == "█" * 15 + "▒" * 45
    assert legend == "█ freeze 25 ms  ▒ restore 75 ms"


@pytest.mark.parametrize("outcome", ["undone", "prepared"])
def test_there_is_nothing_to_see_of_one_that_is_not_done(outcome: str) -> None:
    assert drawn(*hop("web", outcome=outcome)).strip() == ""


def test_one_that_stayed_paused() -> None:
    events = [event for event in hop("web") if not isinstance(event, (GuestStopped, GuestRuns))]
    assert drawn(*events).strip() == ""


def test_more_phases_than_looks() -> None:
    events: list[Event] = [GuestStopped("web", at=0.0)]
    for number in range(20):
        events += [PhaseBegan("web", "p", at=number / 20), PhaseEnded("web", "p", 50.0, at=number / 20 + 0.05)]
    events += [GuestRuns("web", 1000.0, at=1.0), Ended("web", Report(outcome="done"))]
    assert len(drawn(*events).splitlines()[0].strip()) == 60


def test_what_is_under_way() -> None:
    events = [Chosen(("web", "db", "mail")), *hop("mail"), *hop("web")[:5], *hop("db")[:1]]
    last = drawn(*events, terminal=True).rpartition("\x1b[2K")[0]
    assert "freeze ..." in last
    assert "rehearse 200 ms" in last
    assert "1 of 3" in last


def test_names_cannot_speak_to_the_terminal() -> None:
    assert "[b]\\x1b[31m ü" in drawn(*hop("[b]\x1b[31m ü")[:1], terminal=True)


def test_words_of_others_are_not_markup() -> None:
    out = io.StringIO()
    with Picture(Console(file=out, width=20)) as picture:
        picture.say("web: [red]no[/red] " + "long " * 10)
    assert out.getvalue().splitlines()[0] == "web: [red]no[/red] " + ("long " * 10)
