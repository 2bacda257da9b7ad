"""``sevhop check``: what it calls, and what it prints."""

from __future__ import annotations

import argparse
import asyncio
import json

from .. import api
from .exit_codes import EXIT_DONE, EXIT_REFUSED
from .output import say


def run(options: argparse.Namespace) -> int:
    """The command. :return: its exit status."""
    tree = asyncio.run(api.check(options.domain, qmp=options.qmp, emulator=options.emulator, connect=options.connect))
    if options.json:
        print(json.dumps(tree.as_json()))
    else:
        for depth, result in tree.walk():
            say(_line(depth, result))
    return EXIT_REFUSED if tree.failures() else EXIT_DONE


def _line(depth: int, result: api.CheckResult) -> str:
    """One test of a check, indented by its place in the tree."""
    line = f"{'  ' * depth}{result.status.name} {result.name}"
    if result.detail:
        line += f": {result.detail}"
    if result.hint:
        line += f" -> {result.hint}"
    return line
