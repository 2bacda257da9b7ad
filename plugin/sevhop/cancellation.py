"""Work that is completed although the task it belongs to is cancelled meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

Answer = TypeVar("Answer")


async def shielded(work: Coroutine[Any, Any, Answer]) -> Answer:
    """Complete some work even when cancelled meanwhile; only then be cancelled."""
    task = asyncio.ensure_future(work)
    cancelled = await wait_out(task)
    result = task.result()
    if cancelled is not None:
        raise cancelled
    return result


async def wait_out(task: asyncio.Future[Any]) -> asyncio.CancelledError | None:
    """Wait until a task is done, even when cancelled meanwhile. :return: the last cancellation."""
    cancelled = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as err:
            cancelled = err
    return cancelled


@contextlib.asynccontextmanager
async def meanwhile(work: Coroutine[Any, Any, Answer]) -> AsyncIterator[asyncio.Future[Answer]]:
    """
    Do some work during a context. At its end the result is there, which may be an error, for who asks for it. If the
    context fails or is cancelled nobody does, and the work is cancelled.
    """
    task = asyncio.ensure_future(work)
    try:
        yield task
        await asyncio.wait({task})
    except BaseException:
        # That is what is raised, whatever else may happen while the work ends.
        task.cancel()
        await wait_out(task)
        raise
    finally:
        if not task.cancelled():
            task.exception()  # it is not missed
