"""``sevhop recover``: what it calls, and what it prints."""

from __future__ import annotations

import argparse
import json
from collections.abc import Coroutine
from typing import Any

from .. import api
from ..engine.recovery_result import RecoveryOutcome
from ..errors import GuestState
from ..observe import journald
from ..options import RecoverOptions
from . import discard, interruptible
from .exit_codes import EXIT_DONE, EXIT_GUEST_LOST, EXIT_RECOVERY_REQUIRED
from .output import fail, say

_EXIT_OF = {
    RecoveryOutcome.MANUAL: EXIT_RECOVERY_REQUIRED,
    RecoveryOutcome.POSTPONED: EXIT_RECOVERY_REQUIRED,
    RecoveryOutcome.GONE: EXIT_GUEST_LOST,
}


def run(options: argparse.Namespace) -> int:
    """The command. :return: its exit status."""
    discard.verify_usage(options)
    # A guest that is stopped now was left stopped by an interrupted hop already: a hangup must not do so again.
    found = discard.discard(options) if options.discard else interruptible.run(_recovery(options), hangup=False)
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
    return max((_EXIT_OF.get(one.result, EXIT_DONE) for one in found), default=EXIT_DONE)


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
