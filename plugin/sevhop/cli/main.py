"""
Entry point of the ``sevhop`` command. Whatever fails, a user sees one line, or one object with ``--json``.

Nothing that a hop needs is imported before the arguments are known to be valid: so ``--help`` and wrong usage answer
at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from . import terminal
from .exit_codes import EXIT_REFUSED
from .parser import parser


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Execute a command.

    :param arguments: without the name of the program; by default those of this process.
    :return: its exit status.
    :raises SystemExit: after ``--help``, ``--version`` and wrong usage.
    """
    terminal.open_standard_files()
    handler = signal.getsignal(signal.SIGINT)
    status: int | str | None = EXIT_REFUSED
    changes_guests, usage = False, None
    try:
        with terminal.nonblocking_output() as output:
            try:
                options = parser().parse_args(arguments)
            except SystemExit as end:
                usage, status = end, end.code
            else:
                changes_guests = options.command not in ("check", "prepare", "status")
                status = _executed(options)
    finally:
        signal.signal(signal.SIGINT, handler)
    if output.error is not None:
        print(f"sevhop: cannot write to standard output: {output.error.strerror}", file=sys.stderr, flush=True)
        # What has become of a guest matters more than that.
        if not status and not changes_guests:
            return EXIT_REFUSED
    if usage is not None:
        raise usage
    assert isinstance(status, int)
    return status


def program() -> NoReturn:
    """
    Execute the command of this process, and exit. All that it has printed is written by then, and what Python would do
    at its end, such as to free each object, is left to the kernel: that takes it a sixth of what starting takes.

    :raises SystemExit: after ``--help``, ``--version`` and wrong usage.
    """
    os._exit(main())


def _executed(options: argparse.Namespace) -> int:
    try:
        from . import commands

        return commands.run(options)
    except KeyboardInterrupt:
        # Only as long as no guest is changed: see sevhop.cli.terminal.handle_signals.
        from .output import fail

        return fail(options, "interrupted")
