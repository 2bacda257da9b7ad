"""What the commands print: one line for a person, or one JSON object for a program."""

from __future__ import annotations

import argparse
import json
import sys

from sevhop_qmp.errors import SevhopError

from ..errors import GuestState
from ..report import printable
from .exit_codes import EXIT_OF

#: The results of a command that has none.
_EMPTY: dict[str, dict[str, object]] = {
    "upgrade": {"domains": []},
    "prepare": {"domains": []},
    "status": {"domains": []},
    "recover": {"guests": []},
}


def say(text: object) -> None:
    """Print. Much of it is text of a QEMU or its guest, so control characters are escaped."""
    print(printable_lines(text), flush=True)


def complain(text: str) -> None:
    """Report an error, in one line."""
    print(f"sevhop: {printable(text)}", file=sys.stderr, flush=True)


def fail(
    options: argparse.Namespace, error: SevhopError | str, guest_state: GuestState | None = GuestState.UNTOUCHED
) -> int:
    """
    Report an error that is not that of one guest: in one line, or as :func:`error_object`.

    :param guest_state: of all guests; None if the command does not change guests, but perhaps the host.
    :return: the exit status.
    """
    outcome = "recovery-required" if guest_state is GuestState.UNKNOWN else "refused"
    if options.json:
        hint = error.hint if isinstance(error, SevhopError) else ""
        print(json.dumps(error_object(options.command, str(error), outcome, guest_state, hint)))
    elif guest_state is None:
        complain(str(error))
    else:
        complain(f"{error}; {guest_sentence(guest_state)}")
    return EXIT_OF[outcome]


def error_object(
    command: str,
    reason: str,
    outcome: str = "refused",
    guest_state: GuestState | None = GuestState.UNTOUCHED,
    hint: str = "",
) -> dict[str, object]:
    """
    What every command prints with ``--json`` when there is nothing else to print: the same keys as in the report of a
    hop. Those that print a list otherwise print an empty one as well.
    """
    state = None if guest_state is None else guest_state.value
    return _EMPTY.get(command, {}) | {"outcome": outcome, "reason": reason, "hint": hint, "guest_state": state}


def printable_lines(text: object) -> str:
    """Text of several lines, of which each is :func:`printable`."""
    return "\n".join(map(printable, str(text).split("\n")))


def guest_sentence(state: GuestState | None) -> str:
    """The state of the guest, for the end of a message."""
    state = state or GuestState.UNKNOWN
    return "nothing was touched" if state is GuestState.UNTOUCHED else f"the guest is {state.value}"
