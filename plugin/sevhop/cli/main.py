"""
Entry point of the ``sevhop`` command. Whatever fails, a user sees one line, or one object with ``--json``.

Nothing that a hop needs is imported before the arguments are known to be valid: so ``--help`` and wrong usage answer
at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys

from . import terminal
from .exit_codes import EXIT_REFUSED

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence
    from typing import NoReturn


#: Files that a command may have open, if it is allowed to; and without how many it does not begin.
_FILES, _FEWEST_FILES = 4096, 64


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
        with contextlib.ExitStack() as stack:
            try:
                with terminal.deferred_interrupts():
                    output = stack.enter_context(terminal.nonblocking_output())
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
            if (limit := _raised_limit()) < _FEWEST_FILES:
                from .output import fail

                return fail(options, f"only {limit} files may be open at a time (raise that limit: ulimit -Hn)")
            run = _imported(options)
        return run(options)
    except KeyboardInterrupt:
        # Only as long as no guest is changed: see sevhop.cli.terminal.handle_signals.
        from .output import fail

        return fail(options, "interrupted")


def _raised_limit() -> int:
    """
    Raise the soft limit of open files: a hop has those of its guest open, and the default is for programs that use
    select(2). What a new QEMU gets is the old one's.

    :return: the limit then.
    """
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, _FILES)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return soft


def _imported(options: argparse.Namespace) -> Callable[[argparse.Namespace], int]:
    from . import commands

    commands.function_of(options.command)
    return commands.run
