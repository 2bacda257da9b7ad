"""
Progress of hops on a terminal: the phases of those in progress, and a timeline of each downtime.

Drawn by rich, without its thread: only when an event arrives, and those of a downtime arrive after it
(:class:`sevhop.events.DeferringListener`). rich is optional and imported by nothing else: it depends on three more
packages, and a timer has no terminal. Without it phases are plain lines.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..events import DomainsSelected, Event, GuestEvent, GuestResumed, GuestStopped, HopFinished, PhaseBegan, PhaseEnded
from ..report import printable, readable_ms

#: Styles of the phases of a downtime, in turn; neighbours differ without colours, too.
_STYLES = (("█", "cyan"), ("▒", "yellow"), ("█", "magenta"), ("░", "green"), ("█", "blue"), ("▒", "red"))
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
    """A guest whose hop is in progress. ``stopped`` and ``resumed`` are the times at which it last was."""

    spans: list[_Span] = field(default_factory=list)
    stopped: float | None = None
    resumed: float | None = None


class Progress:
    """
    A listener that draws. A context manager: hops in progress are drawn inside it, timelines of finished ones stay.

    :param console: the terminal.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._guests: dict[str, _Guest] = {}
        self._selected = 0
        self._finished = 0
        self._live = Live(console=self._console, auto_refresh=False, transient=True, get_renderable=self._in_progress)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()

    def __call__(self, event: Event) -> None:
        if isinstance(event, DomainsSelected):
            self._selected = len(event.domains)
        elif isinstance(event, HopFinished):
            self._finished += 1
            guest = self._guests.pop(event.guest, None)
            if guest is not None and event.report.outcome == "done":
                self._console.print(*timeline(guest.spans, guest.stopped, guest.resumed), sep="\n")
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
            guest.stopped, guest.resumed = event.at, None
        elif isinstance(event, GuestResumed):
            guest.resumed = event.at

    def _in_progress(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for name, guest in self._guests.items():
            row = Text()
            for span in guest.spans:
                if span.ended is None:
                    row.append(f"{span.phase} ...", style="bold")
                else:
                    row.append(f"{span.phase} {readable_ms((span.ended - span.began) * 1e3)}  ", style="dim")
            table.add_row(Text(printable(name), style="bold"), row)
        if self._selected > 1:
            table.add_row(Text(f"{self._finished} of {self._selected}", style="dim"))
        return table


def timeline(spans: list[_Span], stopped: float | None, resumed: float | None) -> list[Text]:
    """A downtime by phases: a bar, and a legend below it. Nothing if there was no downtime."""
    if stopped is None or resumed is None:
        return []
    parts = [
        (span.phase, min(span.ended or resumed, resumed) - max(span.began, stopped))
        for span in spans
        if span.began < resumed and (span.ended or resumed) > stopped
    ]
    bar, legend = Text("  "), Text("  ")
    for (phase, seconds), (character, style) in zip(parts, _STYLES * len(parts), strict=False):
        bar.append(character * round(_WIDTH * seconds / (resumed - stopped)), style=style)
        legend.append(character, style=style)
        legend.append(f" {phase} {readable_ms(seconds * 1e3)}  ")
    return [bar, legend]
