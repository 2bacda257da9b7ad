"""``sevhop prepare``: what it calls, and what it prints."""

from __future__ import annotations

import argparse
import asyncio
import json

from .. import api
from . import selection
from .exit_codes import EXIT_DONE, EXIT_REFUSED
from .output import complain, say


def run(options: argparse.Namespace) -> int:
    """The command. :return: its exit status."""
    selection.verify_usage(options)
    done = asyncio.run(
        api.prepare(
            options.domains or api.Choice.ALL,
            dry_run=options.dry_run,
            exclude=options.exclude,
            connect=options.connect,
        )
    )
    if options.json:
        found = [one.as_json() for one in done.domains]
        print(json.dumps({"domains": found, "excluded": list(done.excluded)}))
    else:
        for one in done.domains:
            if one.reason:
                complain(str(one))
            else:
                say(one)
        if options.all and not done.domains:
            say("no domain is defined" if not done.excluded else "no other domain is defined")
        if done.excluded:
            say(f"excluded: {', '.join(done.excluded)}")
    return EXIT_REFUSED if any(one.reason for one in done.domains) else EXIT_DONE
