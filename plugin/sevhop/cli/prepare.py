"""``sevhop prepare``: what it calls, and what it prints."""

from __future__ import annotations

import argparse
import asyncio
import json

from sevhop_qmp.errors import SevhopError

from .. import api
from .exit_codes import EXIT_DONE, EXIT_REFUSED
from .output import complain, say


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the arguments of the command."""
    prepare = commands.add_parser(
        "prepare",
        help="change the definitions of libvirt domains so that they can hop",
        description="Change the persistent definition of libvirt domains so that their guests can hop when they were "
        "shut down and started again, and show the difference. Running domains are not touched.",
        epilog="A DOMAIN is a name, a UUID or an id; all are looked up before the first is changed. A definition that "
        "has everything is not changed. The exit status is 1 if a domain was refused.",
    )
    prepare.add_argument("domains", nargs="*", metavar="DOMAIN")
    prepare.add_argument("--all", action="store_true", help="all domains that are defined, active or not")
    prepare.add_argument("--dry-run", action="store_true", help="show the difference only; nothing is changed")
    prepare.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="with --all: leave domains alone whose name matches, such as 'db-*'; may be repeated",
    )
    prepare.add_argument("--connect", metavar="URI", help="libvirt connection (default: qemu:///system)")
    prepare.add_argument("--json", action="store_true", help="print one JSON object, errors included")
    prepare.set_defaults(command="prepare", misused=prepare.error)


def run(options: argparse.Namespace) -> int:
    """The command. :return: its exit status."""
    if bool(options.domains) == options.all:
        options.misused("name domains, or give --all")
    if options.exclude and options.domains:
        options.misused("--exclude goes with --all")
    try:
        done = asyncio.run(
            api.prepare(
                options.domains or api.Choice.ALL,
                dry_run=options.dry_run,
                exclude=options.exclude,
                connect=options.connect,
            )
        )
    except SevhopError as err:
        if options.json:
            print(json.dumps({"domains": [], "reason": str(err)}))
        else:
            complain(f"{err}; nothing was touched")
        return EXIT_REFUSED
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
