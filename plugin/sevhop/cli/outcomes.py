"""What hops report while they are in progress, and when they are over: for a person, the journal, and metrics."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TextIO

from sevhop_qmp.errors import SevhopError

from ..events import DomainsSelected, Event, HopFinished, PhaseEnded, WindowClosed
from ..observe import journald
from ..report import Report, printable, readable_ms
from .exit_codes import EXIT_DONE, EXIT_OF
from .output import complain, guest_sentence, printable_lines

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .. import api
    from .progress import Progress


class Outcomes:
    """
    A listener that prints the reports of hops.

    :ivar selected: the domains to be upgraded.
    :ivar excluded: those that would have been selected by a rule otherwise.
    :ivar outside_window: those whose upgrade was not begun for that reason.
    :ivar reports: of those hops that are over.
    """

    def __init__(self, options: argparse.Namespace, progress: Progress | None) -> None:
        self.selected: tuple[str, ...] = ()
        self.excluded: tuple[str, ...] = ()
        self.outside_window: tuple[str, ...] = ()
        self.reports: dict[str, Report] = {}
        self._options = options
        self._progress = progress
        self._records = journald.Records()

    def __call__(self, event: Event) -> None:
        self._records(event)
        if isinstance(event, DomainsSelected):
            self.selected, self.excluded = event.domains, event.excluded
        elif isinstance(event, WindowClosed):
            self.outside_window = event.domains
            if not self._options.json:
                line = f"not upgraded outside the window {event.window}: {', '.join(event.domains)}"
                self._print(printable(line), sys.stdout)
        elif isinstance(event, HopFinished):
            self.reports[event.guest] = event.report
            self._print_report(event.report)
        if self._progress is not None:
            self._progress(event)
        elif isinstance(event, PhaseEnded) and sys.stderr.isatty() and not self._options.json:
            print(f"{printable(event.guest)}: {event.phase} {readable_ms(event.ms)}", file=sys.stderr, flush=True)

    def _print_report(self, report: Report) -> None:
        if self._options.json:
            return
        if report.reason:
            error = f"sevhop: {report}; {guest_sentence(report.guest_state)}"
            self._print(printable(error), sys.stderr)
        else:
            self._print(printable_lines(report), sys.stdout)

    def _print(self, text: str, file: TextIO) -> None:
        """Print above the progress display, if there is one."""
        if self._progress is not None and file.isatty():
            self._progress.say(text)
        else:
            print(text, file=file, flush=True)

    @property
    def status(self) -> int:
        """The exit status: that of the most severe outcome."""
        return max((EXIT_OF.get(report.outcome, EXIT_DONE) for report in self.reports.values()), default=EXIT_DONE)

    def in_order(self) -> list[Report]:
        """The reports, in the order of the domains selected."""
        return [self.reports[name] for name in self.selected if name in self.reports]

    def summary(self) -> str:
        """The number of domains by outcome, in one line."""
        outcomes = Counter(report.outcome for report in self.in_order())
        if left := len(self.selected) - len(self.reports):
            outcomes["not tried"] = left
        if self.excluded:
            outcomes["excluded"] = len(self.excluded)
        return f"{len(self.selected)} domains: " + ", ".join(
            f"{count} {outcome}" for outcome, count in outcomes.items()
        )


def shown_progress(options: argparse.Namespace) -> AbstractContextManager[Progress | None]:
    """The progress display, if standard error is a terminal and rich is installed."""
    if options.json or options.verbose or not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        return contextlib.nullcontext()
    from .progress import Progress

    return Progress()


def add_metrics(
    options: argparse.Namespace, reports: Iterable[Report], domains: Sequence[api.DomainStatus] | None = None
) -> None:
    """Add them to the metrics, if they are wanted."""
    if options.metrics_dir is not None:
        from ..observe import metrics

        try:
            metrics.add(options.metrics_dir, reports, domains)
        except SevhopError as err:
            complain(str(err))
