"""What the commands print: one line for a person, or one JSON object for a program."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from typing import TextIO

from sevhop_qmp.errors import SevhopError

from ..checks.result import CheckResult
from ..errors import GuestState
from ..events import DomainsSelected, Event, HopFinished, PhaseEnded, WindowClosed
from ..observe import journald
from ..report import Report, printable, readable_ms
from .exit_codes import EXIT_DONE, EXIT_OF

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .progress import Progress


#: The results of a command that has none.
_EMPTY: dict[str, dict[str, object]] = {
    "upgrade": {"domains": []},
    "prepare": {"domains": []},
    "status": {"domains": []},
    "recover": {"guests": []},
}


def say(text: object) -> None:
    """Print. Much of it is text of a QEMU or its guest, so control characters are escaped."""
    print(printable_lines(text), flush=True)


def complain(text: str) -> None:
    """Report an error, in one line."""
    print(f"sevhop: {printable(text)}", file=sys.stderr, flush=True)


def fail(
    options: argparse.Namespace, error: SevhopError | str, guest_state: GuestState | None = GuestState.UNTOUCHED
) -> int:
    """
    Report an error that is not that of one guest: in one line, or as :func:`error_object`.

    :param guest_state: of all guests; None if the command does not change guests, but perhaps the host.
    :return: the exit status.
    """
    outcome = "recovery-required" if guest_state is GuestState.UNKNOWN else "refused"
    if options.json:
        hint = error.hint if isinstance(error, SevhopError) else ""
        print(json.dumps(error_object(options.command, str(error), outcome, guest_state, hint)))
    elif guest_state is None:
        complain(str(error))
    else:
        complain(f"{error}; {guest_sentence(guest_state)}")
    return EXIT_OF[outcome]


def error_object(
    command: str,
    reason: str,
    outcome: str = "refused",
    guest_state: GuestState | None = GuestState.UNTOUCHED,
    hint: str = "",
) -> dict[str, object]:
    """
    What every command prints with ``--json`` when there is nothing else to print: the same keys as in the report of a
    hop. Those that print a list otherwise print an empty one as well.
    """
    state = None if guest_state is None else guest_state.value
    return _EMPTY.get(command, {}) | {"outcome": outcome, "reason": reason, "hint": hint, "guest_state": state}


def printable_lines(text: object) -> str:
    """Text of several lines, of which each is :func:`printable`."""
    return "\n".join(map(printable, str(text).split("\n")))


def guest_sentence(state: GuestState | None) -> str:
    """The state of the guest, for the end of a message."""
    state = state or GuestState.UNKNOWN
    return "nothing was touched" if state is GuestState.UNTOUCHED else f"the guest is {state.value}"


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


def check_line(depth: int, result: CheckResult) -> str:
    """One test of a check, indented by its place in the tree."""
    line = f"{'  ' * depth}{result.status.name} {result.name}"
    if result.detail:
        line += f": {result.detail}"
    if result.hint:
        line += f" -> {result.hint}"
    return line
