"""Work that is done during a context, and what is raised if that fails."""

from __future__ import annotations

import asyncio

import pytest
from sevhop.cancellation import meanwhile


def test_result_is_there_at_the_end_of_the_context() -> None:
    async def run() -> str:
        async with meanwhile(asyncio.sleep(0.01, "done")) as work:
            assert not work.done()
        return work.result()

    assert asyncio.run(run()) == "done"


def test_error_of_the_work_is_for_who_asks_for_its_result() -> None:
    async def fail() -> None:
        raise ValueError("of the work")

    async def run() -> None:
        async with meanwhile(fail()) as work:
            pass
        with pytest.raises(ValueError, match="of the work"):
            work.result()

    asyncio.run(run())


def test_error_of_the_context_is_raised_although_it_is_cancelled_meanwhile() -> None:
    """Otherwise what has become of a guest would not be reported."""
    ending = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ending.set()
            await asyncio.sleep(0.05)

    async def body() -> None:
        async with meanwhile(work()):
            await asyncio.sleep(0)
            raise LookupError("of the context")

    async def run() -> None:
        task = asyncio.ensure_future(body())
        await ending.wait()
        task.cancel()
        with pytest.raises(LookupError, match="of the context"):
            await task

    asyncio.run(run())


@pytest.mark.parametrize("at_its_end", [False, True])
def test_cancelled_context_does_not_wait_for_the_work(at_its_end: bool) -> None:
    async def body() -> None:
        async with meanwhile(asyncio.sleep(60)):
            if not at_its_end:
                await asyncio.sleep(60)

    async def run() -> None:
        task = asyncio.ensure_future(body())
        await asyncio.sleep(0.01)
        task.cancel()
        async with asyncio.timeout(10):
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(run())
