"""``sevhop upgrade``: what it calls, and what it prints."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json

from sevhop_qmp.errors import SevhopError

from .. import api
from ..options import UpgradeOptions
from . import interruptible, selection
from .outcomes import Outcomes, add_metrics, shown_progress
from .output import fail, say


def run(options: argparse.Namespace) -> int:
    """The command. :return: its exit status."""
    selection.verify_usage(options)
    with shown_progress(options) as progress:
        outcomes = Outcomes(options, progress)
        reports = interruptible.run(
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
    add_metrics(options, () if options.dry_run else outcomes.in_order(), _all_domains(options))
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
