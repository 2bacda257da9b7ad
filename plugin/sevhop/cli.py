"""
The command line: arguments, output, exit codes. No logic.

Exit codes: 0 done; 1 refused, nothing was touched; 2 usage; 3 failed and undone, the guest runs where it ran;
4 the guest is paused and safe, ``sevhop recover`` is needed; 5 the guest ended with its QEMU during the hop.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import AbstractContextManager
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO, TypeVar

from sevhop_qmp.errors import SevhopError
from sevhop_qmp.monitor import COMMAND_TIMEOUT

from . import api, journald, metrics, session
from .destination import START_TIMEOUT
from .events import Chosen, Ended, Event, PhaseEnded
from .finding import Finding, failed
from .recover import End
from .report import Report, printable, readable_ms

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .picture import Picture

Answer = TypeVar("Answer")

#: Each takes a few threads and, for a moment, a second QEMU.
MOST_JOBS = 64

EXIT_DONE = 0
EXIT_REFUSED = 1
EXIT_UNDONE = 3
EXIT_NEEDS_RECOVER = 4
EXIT_LOST = 5

#: By the outcome of a hop; any other is done.
EXIT_OF = {
    "refused": EXIT_REFUSED,
    "undone": EXIT_UNDONE,
    "needs-recover": EXIT_NEEDS_RECOVER,
    "lost": EXIT_LOST,
}
_STATE_OF_GUEST = {
    EXIT_REFUSED: "nothing was touched",
    EXIT_UNDONE: "the guest runs where it ran",
    EXIT_NEEDS_RECOVER: "the guest is paused",
    EXIT_LOST: "the guest is gone",
}


def parser() -> argparse.ArgumentParser:
    """The arguments of every command."""
    top = argparse.ArgumentParser(
        prog="sevhop", description="Replace the QEMU process under a running guest, SEV guests included."
    )
    top.add_argument("--version", action="version", version=f"%(prog)s {metadata.version('sevhop')}")
    top.add_argument("--verbose", "-v", action="store_true", help="log what is done, to standard error")
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    hop = commands.add_parser(
        "hop",
        help="hop a guest that runs outside libvirt",
        description="Replace the QEMU behind a QMP socket by a new one, while its guest goes on.",
    )
    hop.add_argument("--source", required=True, type=Path, metavar="PATH", help="QMP socket of the running QEMU")
    hop.add_argument(
        "--emulator", metavar="PATH", help="the QEMU to hop to (default: the source's, as it is on disk now)"
    )
    hop.add_argument("--json", action="store_true", help="print one JSON object, errors included")
    hop.add_argument(
        "--start-timeout",
        type=_seconds,
        default=START_TIMEOUT,
        metavar="S",
        help="seconds in which the new QEMU must come up (default: %(default)g)",
    )
    hop.add_argument(
        "--move-deadline",
        type=_seconds,
        default=2.0,
        metavar="S",
        help="seconds for which a busy migration is tried again (default: %(default)g)",
    )
    hop.add_argument(
        "destination",
        nargs="*",
        metavar="COMMAND",
        help="after --: the destination's whole command line (default: the source's own)",
    )
    hop.set_defaults(run=_hop)

    upgrade = commands.add_parser(
        "upgrade",
        help="hop domains of libvirt",
        description="Replace the QEMU of libvirt domains by a new one, while their guests go on. Each domain keeps its "
        "name, UUID and definition; only the emulator changes.",
        epilog="No more domains are stopped at a time than --jobs allows. After a failure no further one is begun, nor "
        "after a domain that was named is refused; those under way go on to their ends. With --all and --outdated, "
        "domains that cannot hop are told and left out. SIGINT, SIGTERM, SIGQUIT and SIGHUP undo all that are under "
        "way. The exit status is that of the domain that fared worst: 1 also if one was left out.",
    )
    upgrade.add_argument("domains", nargs="*", metavar="DOMAIN")
    upgrade.add_argument("--all", action="store_true", help="all active domains")
    upgrade.add_argument(
        "--outdated",
        action="store_true",
        help="all active domains whose QEMU is another version than is installed, or was replaced on disk",
    )
    upgrade.add_argument(
        "--emulator", metavar="PATH", help="the QEMU to hop to (default: the domain's own, as it is on disk now)"
    )
    upgrade.add_argument("--dry-run", action="store_true", help="check only; nothing is rehearsed")
    upgrade.add_argument(
        "--no-rehearsal",
        action="store_true",
        help="do not have the new QEMU load a trial copy of the device state first, which pauses the guest briefly",
    )
    upgrade.add_argument(
        "--jobs", type=_count, default=1, metavar="N", help="domains to upgrade at a time (default: %(default)s)"
    )
    upgrade.add_argument(
        "--keep-going", action="store_true", help="begin further domains when one fails or is refused"
    )
    upgrade.add_argument(
        "--prepare", action="store_true", help="stop when the guest is held; virsh restore goes on with it"
    )
    upgrade.set_defaults(run=_upgrade, misused=upgrade.error)

    examine = commands.add_parser(
        "check", help="tell whether a guest can hop", description="Tell whether a guest can hop. Nothing is touched."
    )
    which = examine.add_mutually_exclusive_group(required=True)
    which.add_argument("domain", nargs="?", metavar="DOMAIN", help="domain of libvirt")
    which.add_argument("--qmp", type=Path, metavar="PATH", help="QMP socket of a QEMU outside libvirt")
    examine.add_argument("--emulator", metavar="PATH", help="the QEMU to hop to")
    examine.set_defaults(run=_check)

    status = commands.add_parser(
        "status",
        help="tell which QEMU runs each domain",
        description="Tell for each active domain which QEMU runs it, which one is installed, whether it can hop, and "
        "whether a hop is under way.",
    )
    status.add_argument("domains", nargs="*", metavar="DOMAIN", help="default: all active ones")
    status.set_defaults(run=_status)

    mend = commands.add_parser(
        "recover",
        help="finish or undo hops that were broken off",
        description="Bring every hop that was broken off to its end: the guest runs in its old QEMU, or in the new "
        "one. Safe at any time, also when nothing is wrong.",
    )
    mend.add_argument("guests", nargs="*", metavar="DOMAIN", help="default: all")
    mend.add_argument("--json", action="store_true", help="print one JSON object, errors included")
    mend.set_defaults(run=_recover)

    for command in (hop, upgrade, mend):
        command.add_argument(
            "--timeout",
            type=_seconds,
            default=COMMAND_TIMEOUT,
            metavar="S",
            help="seconds for each step (default: %(default)g)",
        )

    for command in (upgrade, examine, status):
        command.add_argument("--connect", metavar="URI", help="libvirt (default: qemu:///system)")
        command.add_argument("--json", action="store_true", help="print one JSON object, errors included")

    for command in (hop, upgrade, status):
        command.add_argument(
            "--metrics-dir", type=Path, metavar="DIR", help="add to the metrics for Prometheus in DIR/sevhop.prom"
        )

    install = commands.add_parser(
        "install", help="install libvirt's hook", description="Install the hook, and see that libvirt calls it."
    )
    install.set_defaults(run=_install)
    uninstall = commands.add_parser("uninstall", help="remove libvirt's hook", description="Remove the hook again.")
    uninstall.set_defaults(run=_uninstall)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the ``sevhop`` command."""
    options = parser().parse_args(arguments)
    with session.patient_output():
        level = logging.INFO if options.verbose else logging.CRITICAL
        logging.basicConfig(level=level, format="%(name)s: %(message)s", stream=sys.stderr)
        logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)  # what matters arrives as an exception
        status: int = options.run(options)
    return status


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 86400:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds")
    return value


def _count(text: str) -> int:
    value = int(text)
    if not 0 < value <= MOST_JOBS:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 to {MOST_JOBS}")
    return value


def _say(text: object) -> None:
    """Print. Much of it are words of a QEMU or its guest, and a terminal does what control characters tell it."""
    print(_printable_lines(text), flush=True)


def _complain(text: str) -> None:
    """Say what is wrong, in one line."""
    print(f"sevhop: {printable(text)}", file=sys.stderr, flush=True)


def _printable_lines(text: object) -> str:
    return "\n".join(map(printable, str(text).split("\n")))


# -- sevhop hop, sevhop upgrade --------------------------------------------------------------------


class _Account:
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
            self._tell(event.report)
        if self._picture is not None:
            self._picture(event)
        elif isinstance(event, PhaseEnded) and sys.stderr.isatty() and not self._options.json:
            print(f"{printable(event.guest)}: {event.phase} {readable_ms(event.ms)}", file=sys.stderr, flush=True)

    def _tell(self, report: Report) -> None:
        if self._options.json:
            return
        if report.reason:
            complaint = f"sevhop: {report}; {_STATE_OF_GUEST[EXIT_OF[report.outcome]]}"
            self._print(printable(complaint), sys.stderr)
        else:
            self._print(_printable_lines(report), sys.stdout)

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


def _run(work: Coroutine[Any, Any, Answer], *, hangup: bool = True) -> Answer | None:
    """
    Run until it is over. Signals that ask for an end cancel it; None when that has undone it.

    :param hangup: whether a terminal that goes away asks for an end.
    """

    async def interruptible() -> Answer:
        task = asyncio.current_task()
        assert task is not None
        session.handle_signals(task.cancel, hangup=hangup)
        return await work

    try:
        return asyncio.run(interruptible())
    except asyncio.CancelledError:
        return None


def _add_metrics(options: argparse.Namespace, reports: Iterable[Report], outdated: int | None = None) -> None:
    if options.metrics_dir is not None:
        try:
            metrics.add(options.metrics_dir, reports, outdated)
        except SevhopError as err:
            _complain(str(err))


def _picture(options: argparse.Namespace) -> AbstractContextManager[Picture | None]:
    """What is drawn on a terminal, if there is one, and what it takes."""
    if options.json or options.verbose or not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        return contextlib.nullcontext()
    from .picture import Picture

    return Picture()


def _hop(options: argparse.Namespace) -> int:
    with _picture(options) as picture, contextlib.suppress(SevhopError):  # the account has it
        account = _Account(options, picture)
        _run(
            api.hop(
                options.source,
                emulator=options.emulator,
                command=options.destination or None,
                step_timeout=options.timeout,
                start_timeout=options.start_timeout,
                move_deadline=options.move_deadline,
                listener=account,
            )
        )
    _add_metrics(options, account.reports.values())
    if options.json:
        (report,) = account.reports.values()
        print(json.dumps(report.as_json()))
    return account.status


def _upgrade(options: argparse.Namespace) -> int:
    if bool(options.domains) + options.all + options.outdated != 1:
        options.misused("name domains, or give --all or --outdated")
    try:
        with _picture(options) as picture:
            account = _Account(options, picture)
            reports = _run(
                api.upgrade_fleet(
                    options.domains or (api.Choice.ALL if options.all else api.Choice.OUTDATED),
                    connect=options.connect,
                    jobs=options.jobs,
                    keep_going=options.keep_going,
                    emulator=options.emulator,
                    prepare_only=options.prepare,
                    dry_run=options.dry_run,
                    rehearse=not options.no_rehearsal,
                    step_timeout=options.timeout,
                    listener=account,
                )
            )
    except SevhopError as err:
        return _no_domains(options, err)
    if reports is None and not account.chosen:
        return _no_domains(options, api.Interrupted("interrupted"))
    _add_metrics(options, account.in_order(), _outdated(options))
    if options.json:
        print(json.dumps({"domains": [report.as_json() for report in account.in_order()]}))
    elif not account.chosen:
        _say(f"no domain is {'outdated' if options.outdated else 'active'}")
    elif len(account.chosen) > 1:
        _say(account.summary())
    return account.status


def _outdated(options: argparse.Namespace) -> int | None:
    """How many domains are outdated now; None if nobody wants to know it, or it cannot be told."""
    if options.metrics_dir is not None:
        with contextlib.suppress(SevhopError):
            return sum(row.outdated for row in asyncio.run(api.status(connect=options.connect)))
    return None


def _no_domains(options: argparse.Namespace, error: SevhopError) -> int:
    """It did not come so far that there were domains."""
    if options.json:
        print(json.dumps({"domains": [], "reason": str(error)}))
    else:
        _complain(f"{error}; nothing was touched")
    return EXIT_REFUSED


# -- sevhop status ---------------------------------------------------------------------------------


def _status(options: argparse.Namespace) -> int:
    try:
        rows = asyncio.run(api.status(options.domains, connect=options.connect))
    except SevhopError as err:
        return _no_domains(options, err)
    if not options.domains:
        _add_metrics(options, (), sum(row.outdated for row in rows))
    if options.json:
        print(json.dumps({"domains": [row.as_json() for row in rows]}))
    else:
        for row in rows:
            _say(row)
    return EXIT_DONE


# -- sevhop recover --------------------------------------------------------------------------------


_EXIT_OF_RECOVERY = {End.STUCK: EXIT_NEEDS_RECOVER, End.GONE: EXIT_LOST}


def _recover(options: argparse.Namespace) -> int:
    # What a hangup would leave stopped has been left once already.
    found = _run(api.recover(options.guests, step_timeout=options.timeout), hangup=False)
    if found is None:
        _complain("interrupted; run it again")
        return EXIT_NEEDS_RECOVER
    if options.json:
        print(json.dumps({"guests": [one.as_json() for one in found]}))
    else:
        for one in found:
            _say(one)
        if not found:
            _say("nothing was broken off")
    return max((_EXIT_OF_RECOVERY.get(one.end, EXIT_DONE) for one in found), default=EXIT_DONE)


# -- sevhop install, uninstall ---------------------------------------------------------------------


def _install(_: argparse.Namespace) -> int:
    return _administered(_installed)


def _installed() -> str:
    from . import installation

    paths = installation.install()
    asyncio.run(installation.see_that_it_is_called())
    asyncio.run(installation.see_that_qemu_reads_the_library())
    return f"installed {', '.join(map(str, paths))}; libvirt calls the hook"


def _uninstall(_: argparse.Namespace) -> int:
    return _administered(_uninstalled)


def _uninstalled() -> str:
    from . import installation

    return "removed" if installation.uninstall() else "it was not installed"


def _administered(do: Callable[[], str]) -> int:
    """Change the host, and say what was done."""
    try:
        api.expect_libvirt()
        _say(do())
    except SevhopError as err:
        _complain(str(err))
        return EXIT_REFUSED
    return EXIT_DONE


# -- sevhop check ----------------------------------------------------------------------------------


def _check(options: argparse.Namespace) -> int:
    try:
        tree = asyncio.run(
            api.check(options.domain, source=options.qmp, emulator=options.emulator, connect=options.connect)
        )
    except SevhopError as err:
        if options.json:
            print(json.dumps(failed("monitor", err.message, err.hint).as_json()))
        else:
            _complain(f"{err}; nothing was touched")
        return EXIT_REFUSED
    if options.json:
        print(json.dumps(tree.as_json()))
    else:
        for depth, finding in tree.walk():
            _say(_line(depth, finding))
    return EXIT_REFUSED if tree.failures() else EXIT_DONE


def _line(depth: int, finding: Finding) -> str:
    line = f"{'  ' * depth}{finding.status.name} {finding.name}"
    if finding.detail:
        line += f": {finding.detail}"
    if finding.remedy:
        line += f" -> {finding.remedy}"
    return line


if __name__ == "__main__":
    sys.exit(main())
