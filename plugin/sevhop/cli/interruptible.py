"""Runs what a signal may interrupt."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from . import terminal

Answer = TypeVar("Answer")


def run(work: Coroutine[Any, Any, Answer], *, hangup: bool = True) -> Answer | None:
    """
    Run something. SIGINT, SIGTERM and SIGQUIT cancel it; None when it was rolled back for that.

    :param hangup: whether SIGHUP cancels it as well.
    """

    async def interruptible() -> Answer:
        task = asyncio.current_task()
        assert task is not None
        terminal.handle_signals(task.cancel, hangup=hangup)
        return await work

    try:
        return asyncio.run(interruptible())
    except asyncio.CancelledError:
        return None
    finally:
        terminal.ignore_interrupts()
