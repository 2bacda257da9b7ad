"""The commands by name: each is a module with a function that runs it, and what that raises is reported here."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Callable

from sevhop_qmp.errors import SevhopError

from ..errors import GuestState

log = logging.getLogger(__name__)

#: The modules, of which only that of the command is imported, and their functions. They call :mod:`sevhop.api`.
_COMMANDS = {
    "hop": ("hop", "run"),
    "upgrade": ("upgrade", "run"),
    "check": ("check", "run"),
    "prepare": ("prepare", "run"),
    "status": ("status", "run"),
    "recover": ("recover", "run"),
    "install": ("installation", "install"),
    "uninstall": ("installation", "uninstall"),
}
#: Commands after whose unexpected end nobody knows where a guest is.
_CHANGE_GUESTS = ("hop", "upgrade", "recover")
#: Commands that change no guest, but may have changed the host when they fail.
_CHANGE_HOST = ("install", "uninstall")


def function_of(command: str) -> Callable[[argparse.Namespace], int]:
    """What runs a command; imported by now."""
    module, name = _COMMANDS[command]
    function: Callable[[argparse.Namespace], int] = getattr(importlib.import_module(f".{module}", __package__), name)
    return function


def run(options: argparse.Namespace) -> int:
    """
    Execute a command. What it raises is reported, and nothing is raised but KeyboardInterrupt.

    :return: its exit status.
    """
    level = logging.INFO if options.verbose else logging.CRITICAL
    logging.basicConfig(level=level, format="%(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)  # what matters arrives as an exception
    try:
        return function_of(options.command)(options)
    except SevhopError as err:
        # Those of hops that have begun are in their reports.
        return _fail(options, err, None if options.command in _CHANGE_HOST else GuestState.UNTOUCHED)
    except Exception as err:
        log.info("unexpected error", exc_info=err)
        return _fail(options, _translated(err), GuestState.UNKNOWN if options.command in _CHANGE_GUESTS else None)


def _fail(options: argparse.Namespace, error: SevhopError, guest_state: GuestState | None) -> int:
    from .output import fail

    return fail(options, error, guest_state)


def _translated(error: Exception) -> SevhopError:
    """An error that was not expected where it arose."""
    if isinstance(error, OSError) and isinstance(error.filename, str | bytes):
        hint = "run sevhop as root" if isinstance(error, PermissionError) else ""
        return SevhopError(f"{os.fsdecode(error.filename)}: {error.strerror}", hint)
    return SevhopError(f"unexpected {type(error).__name__}: {error}", "this is a bug in sevhop: report it")
