"""Runs what a signal may interrupt."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from . import terminal

Answer = TypeVar("Answer")


def run(
    work: Coroutine[Any, Any, Answer], *, hangup: bool = True, interrupted: Callable[[], object] | None = None
) -> Answer | None:
    """
    Run something. SIGINT, SIGTERM and SIGQUIT cancel it; None when it was rolled back for that.

    :param hangup: whether SIGHUP cancels it as well.
    :param interrupted: called then.
    """

    async def interruptible() -> Answer:
        task = asyncio.current_task()
        assert task is not None

        def interrupt() -> None:
            task.cancel()
            if interrupted is not None:
                interrupted()

        terminal.handle_signals(interrupt, hangup=hangup)
        if received:
            received.clear()
            interrupt()
        return await work

    try:
        with terminal.deferred_interrupts() as received:
            return asyncio.run(interruptible())
    except asyncio.CancelledError:
        return None
    finally:
        terminal.ignore_interrupts()
