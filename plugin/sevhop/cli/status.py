"""``sevhop status``: what it calls, and what it prints."""

from __future__ import annotations

import argparse
import asyncio
import json

from .. import api
from .exit_codes import EXIT_DONE, EXIT_RECOVERY_REQUIRED
from .outcomes import add_metrics
from .output import say


def run(options: argparse.Namespace) -> int:
    """The command. :return: its exit status."""
    rows = asyncio.run(api.status(options.domains, connect=options.connect))
    if not options.domains:
        add_metrics(options, (), rows)
    if options.json:
        print(json.dumps({"domains": [row.as_json() for row in rows]}))
    else:
        for row in rows:
            say(row)
        if not rows:
            say("no domain is active")
    return EXIT_DONE if all(row.attended for row in rows) else EXIT_RECOVERY_REQUIRED
