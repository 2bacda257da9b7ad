"""
What is seen of hops on a terminal: the phases of those that are under way, and where each blackout went.

Drawn by rich, without its thread: only when an event arrives, and those of a blackout arrive behind it
(:class:`.events.Unhurried`). rich is optional and imported by nothing else. A host does without it, since it brings
three more packages and nobody looks at the terminal of a timer; then phases are plain lines.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..events import Chosen, Ended, Event, GuestEvent, GuestRuns, GuestStopped, PhaseBegan, PhaseEnded
from ..report import printable, readable_ms

#: How the phases of a blackout look, one after the other: told apart without colours, too.
_LOOKS = (("█", "cyan"), ("▒", "yellow"), ("█", "magenta"), ("░", "green"), ("█", "blue"), ("▒", "red"))
#: Characters of a timeline.
_WIDTH = 60


@dataclass
class _Span:
    """A phase: when it began and ended."""

    phase: str
    began: float
    ended: float | None = None


@dataclass
class _Guest:
    """One that is under way. ``stopped`` is when it was, the last time; ``runs`` when it went on again."""

    spans: list[_Span] = field(default_factory=list)
    stopped: float | None = None
    runs: float | None = None


class Picture:
    """
    A listener that draws. A context manager: what is under way is drawn inside it, and what is over stays.

    :param console: the terminal.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._guests: dict[str, _Guest] = {}
        self._chosen = 0
        self._over = 0
        self._live = Live(console=self._console, auto_refresh=False, transient=True, get_renderable=self._under_way)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Chosen):
            self._chosen = len(event.domains)
        elif isinstance(event, Ended):
            self._over += 1
            guest = self._guests.pop(event.guest, None)
            if guest is not None and event.report.outcome == "done":
                self._console.print(*timeline(guest.spans, guest.stopped, guest.runs), sep="\n")
        elif isinstance(event, GuestEvent):
            self._note(self._guests.setdefault(event.guest, _Guest()), event)
        self._live.refresh()

    def say(self, text: str) -> None:
        """Print something above what is drawn."""
        self._console.print(Text(text), soft_wrap=True)

    def _note(self, guest: _Guest, event: GuestEvent) -> None:
        if isinstance(event, PhaseBegan):
            guest.spans.append(_Span(event.phase, event.at))
        elif isinstance(event, PhaseEnded):
            guest.spans[-1].ended = event.at
        elif isinstance(event, GuestStopped):
            guest.stopped, guest.runs = event.at, None
        elif isinstance(event, GuestRuns):
            guest.runs = event.at

    def _under_way(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for name, guest in self._guests.items():
            row = Text()
            for span in guest.spans:
                if span.ended is None:
                    row.append(f"{span.phase} ...", style="bold")
                else:
                    row.append(f"{span.phase} {readable_ms((span.ended - span.began) * 1e3)}  ", style="dim")
            table.add_row(Text(printable(name), style="bold"), row)
        if self._chosen > 1:
            table.add_row(Text(f"{self._over} of {self._chosen}", style="dim"))
        return table


def timeline(spans: list[_Span], stopped: float | None, runs: float | None) -> list[Text]:
    """Where a blackout went: a bar, and below it what its parts are. Nothing if there was none."""
    if stopped is None or runs is None:
        return []
    parts = [
        (span.phase, min(span.ended or runs, runs) - max(span.began, stopped))
        for span in spans
        if span.began < runs and (span.ended or runs) > stopped
    ]
    bar, legend = Text("  "), Text("  ")
    for (phase, seconds), (character, style) in zip(parts, _LOOKS * len(parts), strict=False):
        bar.append(character * round(_WIDTH * seconds / (runs - stopped)), style=style)
        legend.append(character, style=style)
        legend.append(f" {phase} {readable_ms(seconds * 1e3)}  ")
    return [bar, legend]
