"""Calls to libvirt, as far as they can be tested without one."""

from __future__ import annotations

import asyncio

import pytest
from sevhop.libvirt import daemon


def test_cancellation_is_kept_if_it_arrives_with_the_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not be lost, or a hop that somebody asked to roll back would continue."""

    async def interrupted() -> bool:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[str] = loop.create_future()
        monkeypatch.setattr(loop, "run_in_executor", lambda *_: answer)
        call = asyncio.ensure_future(daemon.call(str))
        await asyncio.sleep(0)
        answer.set_result("done")
        call.cancel()
        await asyncio.wait({call})
        return call.cancelled()

    assert asyncio.run(interrupted())
