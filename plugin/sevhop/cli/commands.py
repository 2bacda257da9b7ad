"""The commands: what each calls in :mod:`sevhop.api`, and what it prints."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from sevhop_qmp.errors import SevhopError

from .. import api
from ..engine.recovery_result import RecoveryOutcome
from ..errors import GuestState
from ..observe import journald, metrics
from ..options import HopOptions, RecoverOptions, UpgradeOptions
from ..report import Report
from . import discard, prepare, selection, terminal
from .exit_codes import EXIT_DONE, EXIT_GUEST_LOST, EXIT_RECOVERY_REQUIRED, EXIT_REFUSED
from .output import Outcomes, check_line, complain, fail, say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .progress import Progress

Answer = TypeVar("Answer")

log = logging.getLogger(__name__)

#: Commands after whose unexpected end nobody knows where a guest is.
_CHANGE_GUESTS = ("hop", "upgrade", "recover")
#: Commands that change no guest, but may have changed the host when they fail.
_CHANGE_HOST = ("install", "uninstall")


def run(options: argparse.Namespace) -> int:
    """
    Execute a command. What it raises is reported, and nothing is raised but KeyboardInterrupt.

    :return: its exit status.
    """
    level = logging.INFO if options.verbose else logging.CRITICAL
    logging.basicConfig(level=level, format="%(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)  # what matters arrives as an exception
    try:
        return _COMMANDS[options.command](options)
    except SevhopError as err:
        # Those of hops that have begun are in their reports.
        return fail(options, err, None if options.command in _CHANGE_HOST else GuestState.UNTOUCHED)
    except Exception as err:
        log.info("unexpected error", exc_info=err)
        return fail(options, _translated(err), GuestState.UNKNOWN if options.command in _CHANGE_GUESTS else None)


def _translated(error: Exception) -> SevhopError:
    """An error that was not expected where it arose."""
    if isinstance(error, OSError) and isinstance(error.filename, str | bytes):
        hint = "run sevhop as root" if isinstance(error, PermissionError) else ""
        return SevhopError(f"{os.fsdecode(error.filename)}: {error.strerror}", hint)
    return SevhopError(f"unexpected {type(error).__name__}: {error}", "this is a bug in sevhop: report it")


def _run(work: Coroutine[Any, Any, Answer], *, hangup: bool = True) -> Answer | None:
    """
    Run it. SIGINT, SIGTERM and SIGQUIT cancel it; None when it was rolled back for that.

    :param hangup: whether SIGHUP cancels it as well.
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
    finally:
        terminal.ignore_interrupts()


def _add_metrics(
    options: argparse.Namespace, reports: Iterable[Report], domains: Sequence[api.DomainStatus] | None = None
) -> None:
    if options.metrics_dir is not None:
        try:
            metrics.add(options.metrics_dir, reports, domains)
        except SevhopError as err:
            complain(str(err))


def _progress(options: argparse.Namespace) -> AbstractContextManager[Progress | None]:
    """The progress display, if standard error is a terminal and rich is installed."""
    if options.json or options.verbose or not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        return contextlib.nullcontext()
    from .progress import Progress

    return Progress()


def _hop(options: argparse.Namespace) -> int:
    with _progress(options) as progress:
        outcomes = Outcomes(options, progress)
        try:
            _run(
                api.hop(
                    options.qmp,
                    HopOptions(
                        emulator=options.emulator,
                        command=options.destination or None,
                        step_timeout=options.timeout,
                        start_timeout=options.start_timeout,
                        move_deadline=options.move_deadline,
                    ),
                    listener=outcomes,
                )
            )
        except SevhopError:
            if not outcomes.reports:
                raise
    if not outcomes.reports:
        return fail(options, "interrupted")
    _add_metrics(options, outcomes.reports.values())
    if options.json:
        (report,) = outcomes.reports.values()
        print(json.dumps(report.as_json()))
    return outcomes.status


def _upgrade(options: argparse.Namespace) -> int:
    selection.verify_usage(options)
    with _progress(options) as progress:
        outcomes = Outcomes(options, progress)
        reports = _run(
            api.upgrade_fleet(
                options.domains or (api.Choice.ALL if options.all else api.Choice.OUTDATED),
                UpgradeOptions(
                    emulator=options.emulator,
                    prepare_only=options.prepare,
                    dry_run=options.dry_run,
                    transit=not options.no_transit,
                    rehearse=not options.no_rehearsal,
                    set_time=not options.no_set_time,
                    step_timeout=options.timeout,
                ),
                connect=options.connect,
                jobs=options.jobs,
                keep_going=options.keep_going,
                max_failures=options.max_failures,
                exclude=options.exclude,
                window=options.window,
                listener=outcomes,
            )
        )
    if reports is None and not outcomes.selected:
        return fail(options, "interrupted")
    # A dry run is no hop that was refused.
    _add_metrics(options, () if options.dry_run else outcomes.in_order(), _all_domains(options))
    if options.json:
        found = [report.as_json() for report in outcomes.in_order()]
        left = {"excluded": list(outcomes.excluded), "outside_window": list(outcomes.outside_window)}
        print(json.dumps({"domains": found, **left}))
    elif not outcomes.selected:
        others = f"; excluded: {', '.join(outcomes.excluded)}" if outcomes.excluded else ""
        say(f"no {'other ' if others else ''}domain is {'outdated' if options.outdated else 'active'}{others}")
    elif len(outcomes.selected) > 1 or outcomes.excluded:
        say(outcomes.summary())
    return outcomes.status


def _all_domains(options: argparse.Namespace) -> list[api.DomainStatus] | None:
    """As they are now; None if there are no metrics to write, or libvirt does not answer."""
    if options.metrics_dir is not None:
        with contextlib.suppress(SevhopError):
            return asyncio.run(api.status(connect=options.connect))
    return None


# -- sevhop status ---------------------------------------------------------------------------------


def _status(options: argparse.Namespace) -> int:
    rows = asyncio.run(api.status(options.domains, connect=options.connect))
    if not options.domains:
        _add_metrics(options, (), rows)
    if options.json:
        print(json.dumps({"domains": [row.as_json() for row in rows]}))
    else:
        for row in rows:
            say(row)
        if not rows:
            say("no domain is active")
    return EXIT_DONE if all(row.attended for row in rows) else EXIT_RECOVERY_REQUIRED


# -- sevhop recover --------------------------------------------------------------------------------


_EXIT_OF_RECOVERY = {
    RecoveryOutcome.MANUAL: EXIT_RECOVERY_REQUIRED,
    RecoveryOutcome.POSTPONED: EXIT_RECOVERY_REQUIRED,
    RecoveryOutcome.GONE: EXIT_GUEST_LOST,
}


def _recover(options: argparse.Namespace) -> int:
    discard.verify_usage(options)
    # A guest that is stopped now was left stopped by an interrupted hop already: a hangup must not do so again.
    found = discard.discard(options) if options.discard else _run(_recovery(options), hangup=False)
    if found is None:
        return fail(options, "the recovery was interrupted; run it again", GuestState.UNKNOWN)
    records = journald.Records()
    for one in found:
        records.recovered(one)
    records.close()
    if options.json:
        print(json.dumps({"guests": [one.as_json() for one in found]}))
    else:
        for one in found:
            say(one)
        if not found:
            say("no interrupted hop was found")
    return max((_EXIT_OF_RECOVERY.get(one.result, EXIT_DONE) for one in found), default=EXIT_DONE)


def _recovery(options: argparse.Namespace) -> Coroutine[Any, Any, list[api.RecoveredGuest]]:
    max_age = RecoverOptions.UNATTENDED_AGE if options.unattended and options.max_age is None else options.max_age
    return api.recover(
        options.guests,
        unattended=options.unattended,
        max_age=max_age,
        emulator=options.emulator,
        set_time=not options.no_set_time,
        step_timeout=options.timeout,
    )


# -- sevhop install, uninstall ---------------------------------------------------------------------


def _install(options: argparse.Namespace) -> int:
    api.expect_libvirt()
    return _administered(options, _verified() if options.verify else _installed())


def _installed() -> str:
    from ..install import host

    paths = host.install()
    return f"installed {', '.join(map(str, paths))}; {_verified()}"


def _verified() -> str:
    from ..install import verification
    from ..libvirt.connection import Connection

    async def verify() -> None:
        connection = await Connection.open()
        try:
            await verification.verify_hook(connection, verification.ATTEMPTS)
            await verification.verify_library(connection)
        finally:
            connection.close()

    asyncio.run(verify())
    return "libvirt calls the hook"


def _uninstall(options: argparse.Namespace) -> int:
    api.expect_libvirt()
    from ..engine import way_back
    from ..guest import kept_emulator
    from ..install import host
    from ..libvirt.daemon import DEFAULT_URI
    from ..records import reboot_mark

    rebooting = reboot_mark.names()
    done = "removed" if host.uninstall() else "it was not installed"
    notes = []
    if kept_emulator.directories():
        asyncio.run(way_back.forget_unused_at(DEFAULT_URI))
    if kept_emulator.directories():
        notes.append(f"{kept_emulator.DIRECTORY} stays: guests that were rolled back run from it, or are saved")
    if rebooting:
        notes.append(
            f"the next reboot of {', '.join(rebooting)} is a shutdown, and the hook does not start them again any"
            " more; then run: virsh start"
        )
    return _administered(options, done, notes)


def _administered(options: argparse.Namespace, done: str, notes: Sequence[str] = ()) -> int:
    """Print what was changed on the host."""
    if options.json:
        print(json.dumps({"outcome": "done", "detail": done, "notes": list(notes)}))
    else:
        for note in notes:
            complain(f"note: {note}")
        say(done)
    return EXIT_DONE


# -- sevhop check ----------------------------------------------------------------------------------


def _check(options: argparse.Namespace) -> int:
    tree = asyncio.run(api.check(options.domain, qmp=options.qmp, emulator=options.emulator, connect=options.connect))
    if options.json:
        print(json.dumps(tree.as_json()))
    else:
        for depth, result in tree.walk():
            say(check_line(depth, result))
    return EXIT_REFUSED if tree.failures() else EXIT_DONE


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "hop": _hop,
    "upgrade": _upgrade,
    "check": _check,
    "prepare": prepare.run,
    "status": _status,
    "recover": _recover,
    "install": _install,
    "uninstall": _uninstall,
}
