"""What the commands print: one line for a person, or one JSON object for a program."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from typing import TextIO

from ..checks.result import Finding
from ..events import Chosen, Ended, Event, PhaseEnded
from ..observe import journald
from ..report import Report, printable, readable_ms
from .exit_codes import EXIT_DONE, EXIT_LOST, EXIT_NEEDS_RECOVER, EXIT_OF, EXIT_REFUSED, EXIT_UNDONE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .progress import Picture

STATE_OF_GUEST = {
    EXIT_REFUSED: "nothing was touched",
    EXIT_UNDONE: "the guest runs where it ran",
    EXIT_NEEDS_RECOVER: "the guest is paused",
    EXIT_LOST: "the guest is gone",
}


def say(text: object) -> None:
    """Print. Much of it are words of a QEMU or its guest, and a terminal does what control characters tell it."""
    print(printable_lines(text), flush=True)


def complain(text: str) -> None:
    """Say what is wrong, in one line."""
    print(f"sevhop: {printable(text)}", file=sys.stderr, flush=True)


def printable_lines(text: object) -> str:
    """Text of several lines, of which each is :func:`printable`."""
    return "\n".join(map(printable, str(text).split("\n")))


class Outcomes:
    """
    Hears what becomes of hops, and tells it.

    :ivar chosen: the domains that were to be upgraded.
    :ivar reports: of those hops that have ended.
    """

    def __init__(self, options: argparse.Namespace, picture: Picture | None) -> None:
        self.chosen: tuple[str, ...] = ()
        self.reports: dict[str, Report] = {}
        self._options = options
        self._picture = picture
        self._records = journald.Records()

    def __call__(self, event: Event) -> None:
        self._records(event)
        if isinstance(event, Chosen):
            self.chosen = event.domains
        elif isinstance(event, Ended):
            self.reports[event.guest] = event.report
            self._print_report(event.report)
        if self._picture is not None:
            self._picture(event)
        elif isinstance(event, PhaseEnded) and sys.stderr.isatty() and not self._options.json:
            print(f"{printable(event.guest)}: {event.phase} {readable_ms(event.ms)}", file=sys.stderr, flush=True)

    def _print_report(self, report: Report) -> None:
        if self._options.json:
            return
        if report.reason:
            complaint = f"sevhop: {report}; {STATE_OF_GUEST[EXIT_OF[report.outcome]]}"
            self._print(printable(complaint), sys.stderr)
        else:
            self._print(printable_lines(report), sys.stdout)

    def _print(self, text: str, file: TextIO) -> None:
        """Where a picture is drawn it has to know."""
        if self._picture is not None and file.isatty():
            self._picture.say(text)
        else:
            print(text, file=file, flush=True)

    @property
    def status(self) -> int:
        """The exit status: that of the guest that fared worst."""
        return max((EXIT_OF.get(report.outcome, EXIT_DONE) for report in self.reports.values()), default=EXIT_DONE)

    def in_order(self) -> list[Report]:
        """The reports, in the order in which the domains were chosen."""
        return [self.reports[name] for name in self.chosen if name in self.reports]

    def summary(self) -> str:
        """How many domains came to what, in one line."""
        outcomes = Counter(report.outcome for report in self.in_order())
        if left := len(self.chosen) - len(self.reports):
            outcomes["not tried"] = left
        return f"{len(self.chosen)} domains: " + ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())


def finding_line(depth: int, finding: Finding) -> str:
    """One test of a check, indented by its place in the tree."""
    line = f"{'  ' * depth}{finding.status.name} {finding.name}"
    if finding.detail:
        line += f": {finding.detail}"
    if finding.remedy:
        line += f" -> {finding.remedy}"
    return line
