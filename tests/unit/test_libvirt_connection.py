"""Calls to libvirt, as far as they can be had without one."""

from __future__ import annotations

import asyncio

import pytest
from sevhop.libvirt import connection


def test_an_interruption_that_comes_with_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not be forgotten, or what somebody asked to be undone would be done."""

    async def interrupted() -> bool:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[str] = loop.create_future()
        monkeypatch.setattr(loop, "run_in_executor", lambda *_: answer)
        call = asyncio.ensure_future(connection._call(str))
        await asyncio.sleep(0)
        answer.set_result("done")
        call.cancel()
        await asyncio.wait({call})
        return call.cancelled()

    assert asyncio.run(interrupted())
