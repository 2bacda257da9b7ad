"""The domains that a command is given: they are named, or selected by a rule that may leave out some."""

from __future__ import annotations

import argparse


def add_exclude(command: argparse.ArgumentParser, *rules: str) -> None:
    """
    Add ``--exclude``.

    :param rules: the options that select domains, of which one is given if no domain is named.
    """
    command.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help=f"with {' and '.join(rules)}: leave domains alone whose name matches, such as 'db-*'; may be repeated",
    )
    command.set_defaults(rules=rules)


def verify_usage(options: argparse.Namespace) -> None:
    """Either domains are named, or one rule selects them. Does not return for a wrong usage."""
    rules = " or ".join(options.rules)
    given = sum(getattr(options, rule.removeprefix("--")) for rule in options.rules)
    if bool(options.domains) + given != 1:
        count = {1: "two", 2: "three"}[len(options.rules)]
        options.misused(f"name domains, or give {rules}: one of the {count}")
    if options.exclude and options.domains:
        options.misused(f"--exclude goes with {rules}")
