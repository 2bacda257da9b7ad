"""
Entry point of the ``sevhop`` command. Whatever fails, a user sees one line, or one object with ``--json``.

Nothing that a hop needs is imported before the arguments are known to be valid: so ``--help`` and wrong usage answer
at once.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

from . import terminal
from .exit_codes import EXIT_REFUSED

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence


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
    changes, usage = False, None
    try:
        with terminal.nonblocking_output() as output:
            try:
                with terminal.deferred_interrupts():
                    options = _parsed(arguments)
            except SystemExit as end:
                usage, status = end, end.code
            except KeyboardInterrupt:
                print("sevhop: interrupted; nothing was touched", file=sys.stderr, flush=True)
            else:
                changes = options.command not in ("check", "status") and not getattr(options, "dry_run", False)
                status = _executed(options)
    finally:
        signal.signal(signal.SIGINT, handler)
    if output.error is not None:
        print(f"sevhop: cannot write to standard output: {output.error.strerror}", file=sys.stderr, flush=True)
        # What has become of a guest matters more than that.
        if not status and not changes:
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


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    from .parser import parser

    return parser().parse_args(arguments)


def _executed(options: argparse.Namespace) -> int:
    try:
        with terminal.deferred_interrupts():
            run = _imported(options)
        return run(options)
    except KeyboardInterrupt:
        # Only as long as no guest is changed: see sevhop.cli.terminal.handle_signals.
        from .output import fail

        return fail(options, "interrupted")


def _imported(options: argparse.Namespace) -> Callable[[argparse.Namespace], int]:
    from . import commands

    commands.function_of(options.command)
    return commands.run
