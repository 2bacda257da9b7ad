"""The commands: what each asks of :mod:`sevhop.api`, and what it prints."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import logging
import sys
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from sevhop_qmp.errors import SevhopError

from .. import api
from ..checks.result import failed
from ..engine.recovery_result import End
from ..observe import metrics
from ..report import Report
from . import terminal
from .exit_codes import EXIT_DONE, EXIT_LOST, EXIT_NEEDS_RECOVER, EXIT_REFUSED
from .output import Outcomes, complain, finding_line, say
from .parser import parser

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .progress import Picture

Answer = TypeVar("Answer")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the ``sevhop`` command."""
    options = parser().parse_args(arguments)
    with terminal.patient_output():
        level = logging.INFO if options.verbose else logging.CRITICAL
        logging.basicConfig(level=level, format="%(name)s: %(message)s", stream=sys.stderr)
        logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)  # what matters arrives as an exception
        status: int = _COMMANDS[options.command](options)
    return status


def _run(work: Coroutine[Any, Any, Answer], *, hangup: bool = True) -> Answer | None:
    """
    Run until it is over. Signals that ask for an end cancel it; None when that has undone it.

    :param hangup: whether a terminal that goes away asks for an end.
    """

    async def interruptible() -> Answer:
        task = asyncio.current_task()
        assert task is not None
        terminal.handle_signals(task.cancel, hangup=hangup)
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
            complain(str(err))


def _picture(options: argparse.Namespace) -> AbstractContextManager[Picture | None]:
    """What is drawn on a terminal, if there is one, and what it takes."""
    if options.json or options.verbose or not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        return contextlib.nullcontext()
    from .progress import Picture

    return Picture()


def _hop(options: argparse.Namespace) -> int:
    with _picture(options) as picture, contextlib.suppress(SevhopError):  # the account has it
        account = Outcomes(options, picture)
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
            account = Outcomes(options, picture)
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
        say(f"no domain is {'outdated' if options.outdated else 'active'}")
    elif len(account.chosen) > 1:
        say(account.summary())
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
        complain(f"{error}; nothing was touched")
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
            say(row)
    return EXIT_DONE


# -- sevhop recover --------------------------------------------------------------------------------


_EXIT_OF_RECOVERY = {End.STUCK: EXIT_NEEDS_RECOVER, End.GONE: EXIT_LOST}


def _recover(options: argparse.Namespace) -> int:
    # What a hangup would leave stopped has been left once already.
    found = _run(api.recover(options.guests, step_timeout=options.timeout), hangup=False)
    if found is None:
        complain("interrupted; run it again")
        return EXIT_NEEDS_RECOVER
    if options.json:
        print(json.dumps({"guests": [one.as_json() for one in found]}))
    else:
        for one in found:
            say(one)
        if not found:
            say("nothing was broken off")
    return max((_EXIT_OF_RECOVERY.get(one.end, EXIT_DONE) for one in found), default=EXIT_DONE)


# -- sevhop install, uninstall ---------------------------------------------------------------------


def _install(_: argparse.Namespace) -> int:
    return _administered(_installed)


def _installed() -> str:
    from ..install import host

    paths = host.install()
    asyncio.run(host.see_that_it_is_called())
    asyncio.run(host.see_that_qemu_reads_the_library())
    return f"installed {', '.join(map(str, paths))}; libvirt calls the hook"


def _uninstall(_: argparse.Namespace) -> int:
    return _administered(_uninstalled)


def _uninstalled() -> str:
    from ..install import host

    return "removed" if host.uninstall() else "it was not installed"


def _administered(do: Callable[[], str]) -> int:
    """Change the host, and say what was done."""
    try:
        api.expect_libvirt()
        say(do())
    except SevhopError as err:
        complain(str(err))
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
            complain(f"{err}; nothing was touched")
        return EXIT_REFUSED
    if options.json:
        print(json.dumps(tree.as_json()))
    else:
        for depth, finding in tree.walk():
            say(finding_line(depth, finding))
    return EXIT_REFUSED if tree.failures() else EXIT_DONE

_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "hop": _hop,
    "upgrade": _upgrade,
    "check": _check,
    "status": _status,
    "recover": _recover,
    "install": _install,
    "uninstall": _uninstall,
}
