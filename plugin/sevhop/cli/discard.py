"""``sevhop recover --discard``: says what would be lost, asks, and gives up the guest of a domain."""

from __future__ import annotations

import argparse
import asyncio
import sys

from .. import api
from .output import printable_lines


def verify_usage(options: argparse.Namespace) -> None:
    """What only ``--discard``, or only one domain, goes with. Does not return for a wrong usage."""
    if (options.discard or options.emulator) and len(options.guests) != 1:
        options.misused(f"{'--discard' if options.discard else '--emulator'} needs one DOMAIN")
    if options.discard and (options.emulator or options.unattended):
        options.misused("--discard goes neither with --emulator nor with --unattended")
    if options.yes and not options.discard:
        options.misused("--yes goes with --discard")
    if options.discard and not options.yes and not sys.stdin.isatty():
        options.misused("--discard asks on a terminal; without one give --yes")


def discard(options: argparse.Namespace) -> list[api.RecoveredGuest]:
    """
    Give up a guest, if somebody agrees to that.

    :raises SevhopError: nobody does, or it cannot be given up.
    """
    (name,) = options.guests
    loss = asyncio.run(api.assess_discard(name, step_timeout=options.timeout))
    if not options.yes and not _agreed(loss):
        raise api.Refused("the guest was not given up")
    # Not to be interrupted halfway; each step has its time limit.
    return [asyncio.run(api.discard(loss, step_timeout=options.timeout))]


def _agreed(loss: api.Loss) -> bool:
    question = "Give up the guest?" if loss.has_guest else "Remove that?"
    print(f"{printable_lines(loss)}\n{question} [y/N] ", end="", file=sys.stderr, flush=True)
    try:
        return sys.stdin.readline().strip().lower() in ("y", "yes")
    except KeyboardInterrupt:
        return False
