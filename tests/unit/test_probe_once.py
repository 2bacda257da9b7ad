"""A probe takes long: two who want the same one have one result, also if it is an error."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from sevhop.guest import preload
from sevhop_qmp.errors import SevhopError


@pytest.fixture(autouse=True)
def nothing_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preload, "_probed", {})


def both(answer: Callable[[], bool]) -> tuple[list[object], int]:
    """What two threads get that want the same while it is probed, and how often it was."""
    began, go_on = threading.Event(), threading.Event()
    calls: list[None] = []

    def probe() -> bool:
        calls.append(None)
        began.set()
        assert go_on.wait(10)
        return answer()

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(preload._once, "key", probe)
        assert began.wait(10)
        second = pool.submit(preload._once, "key", probe)
        go_on.set()
        results: list[object] = [one.exception(10) or one.result(10) for one in (first, second)]
    return results, len(calls)


def test_result_is_shared_and_kept() -> None:
    assert both(lambda: True) == ([True, True], 1)
    assert preload._once("key", lambda: pytest.fail("it is known")) is True


def test_error_is_not_kept() -> None:
    def fail() -> bool:
        raise SevhopError("no answer")

    results, _ = both(fail)
    assert [str(one) for one in results] == ["no answer", "no answer"]
    assert preload._once("key", lambda: False) is False
    assert preload._running == {}
