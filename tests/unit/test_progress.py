"""What is drawn of simulated hops."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from sevhop.cli.progress import Progress
from sevhop.events import DomainsSelected, Event, GuestResumed, GuestStopped, HopFinished, PhaseBegan, PhaseEnded
from sevhop.report import Report


def hop(guest: str, *, outcome: str = "done") -> list[Event]:
    """A hop with a rehearsal of 20 ms, and a downtime of 100 ms: 25 in stop, 75 in restore."""
    return [
        PhaseBegan(guest, "rehearse", at=1.0),
        GuestStopped(guest, at=1.1),
        GuestResumed(guest, 20.0, at=1.12),
        PhaseEnded(guest, "rehearse", 200.0, at=1.2),
        PhaseBegan(guest, "stop", at=1.99),
        GuestStopped(guest, at=2.0),
        PhaseEnded(guest, "stop", 35.0, at=2.025),
        PhaseBegan(guest, "restore", at=2.025),
        GuestResumed(guest, 100.0, at=2.1),
        PhaseEnded(guest, "restore", 475.0, at=2.5),
        PhaseBegan(guest, "define", at=2.5),
        PhaseEnded(guest, "define", 1.0, at=2.501),
        HopFinished(guest, Report(guest, outcome=outcome)),
    ]


def drawn(*events: Event, terminal: bool = False) -> str:
    """All that is written, to a terminal or as it would stay on one."""
    out = io.StringIO()
    with Progress(Console(file=out, force_terminal=terminal, width=100, color_system=None)) as progress:
        for event in events:
            progress(event)
    return out.getvalue()


def test_timeline_of_the_downtime_stays() -> None:
    bar, legend = (line.strip() for line in drawn(*hop("web")).splitlines() if line.strip())
    assert bar == "█" * 15 + "▒" * 45
    assert legend == "█ stop 25 ms  ▒ restore 75 ms"


@pytest.mark.parametrize("outcome", ["rolled-back", "prepared"])
def test_timeline_is_omitted_for_a_hop_that_is_not_done(outcome: str) -> None:
    assert drawn(*hop("web", outcome=outcome)).strip() == ""


def test_timeline_is_omitted_for_a_paused_guest() -> None:
    events = [event for event in hop("web") if not isinstance(event, (GuestStopped, GuestResumed))]
    assert drawn(*events).strip() == ""


def test_timeline_keeps_its_width_with_more_phases_than_styles() -> None:
    events: list[Event] = [GuestStopped("web", at=0.0)]
    for number in range(20):
        events += [PhaseBegan("web", "p", at=number / 20), PhaseEnded("web", "p", 50.0, at=number / 20 + 0.05)]
    events += [GuestResumed("web", 1000.0, at=1.0), HopFinished("web", Report(outcome="done"))]
    assert len(drawn(*events).splitlines()[0].strip()) == 60


def test_hops_in_progress_are_displayed() -> None:
    events = [DomainsSelected(("web", "db", "mail")), *hop("mail"), *hop("web")[:5], *hop("db")[:1]]
    last = drawn(*events, terminal=True).rpartition("\x1b[2K")[0]
    assert "stop ..." in last
    assert "rehearse 200 ms" in last
    assert "1 of 3" in last


def test_control_characters_in_names_are_escaped() -> None:
    assert "[b]\\x1b[31m ü" in drawn(*hop("[b]\x1b[31m ü")[:1], terminal=True)


def test_markup_in_text_is_not_interpreted() -> None:
    out = io.StringIO()
    with Progress(Console(file=out, width=20)) as progress:
        progress.say("web: [red]no[/red] " + "long " * 10)
    assert out.getvalue().splitlines()[0] == "web: [red]no[/red] " + ("long " * 10)
