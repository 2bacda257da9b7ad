"""An end in order for programs that have guests: whoever ends them leaves nothing behind."""

from __future__ import annotations

import signal
from typing import NoReturn


def end_in_order() -> None:
    """From now on the signals that end a program raise SystemExit, so that every context manager comes to its end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)


def _end(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)
