"""
When a recovery is tried that nobody has asked for: soon after the first failure, and less and less often after others.

The journal of the hop has the number of failures and the time of the next attempt, so that it does not matter which
process fails. Whoever runs ``sevhop recover`` has it tried at once, and the count begins again.
"""

from __future__ import annotations

import time
from typing import Any

import tenacity

from .hop_record import HopRecord, uptime

#: Seconds between two attempts: one minute after the first failure, then twice as long each time.
WAIT = tenacity.wait_exponential(multiplier=60, max=3600)


def after_failure(record: HopRecord, reason: str, *, unattended: bool) -> dict[str, Any]:
    """
    What the journal gets when a recovery has failed.

    :param reason: of the failure, in one line.
    :param unattended: nobody has asked for this one.
    """
    failures = record.failures + 1 if unattended else 1
    return {"failures": failures, "failure": reason.replace("\0", ""), "next_attempt": uptime() + _seconds(failures)}


def remaining(record: HopRecord) -> float:
    """Seconds until the next attempt; 0 if one may be made now."""
    # Not more than there can be, whatever the journal has.
    return min(max(record.next_attempt - uptime(), 0.0), float(WAIT.max)) if record.failures else 0.0


def next_attempt(record: HopRecord) -> str:
    """When the timer tries again, by the host's clock."""
    return f"tried again after {time.strftime('%H:%M:%S', time.localtime(time.time() + remaining(record)))}"


def _seconds(failures: int) -> float:
    state = tenacity.RetryCallState(tenacity.Retrying(), None, (), {})
    state.attempt_number = failures
    return WAIT(state)
