"""What the interface for Python guarantees: its imports, cancellation, and when a listener is called."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable

import pytest
from sevhop import api, events
from sevhop.engine.transaction import CommitState, Transaction
from sevhop.errors import Refused, RolledBack
from sevhop.events import DeferringListener, Event, GuestResumed, GuestStopped, HopFinished, Listener, PhaseBegan
from sevhop.report import Report


@pytest.mark.parametrize(
    ("module", "without"), [("sevhop", ["asyncio", "sevhop_qmp"]), ("sevhop.api", ["libvirt", "rich", "argparse"])]
)
def test_import_is_cheap(module: str, without: list[str]) -> None:
    program = f"import sys, {module}; print(*(name for name in {without} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_public_names_exist_and_are_documented() -> None:
    assert api.__all__ == sorted(api.__all__, key=lambda name: (name.islower(), name))
    for name in api.__all__:
        assert name == "Listener" or getattr(api, name).__doc__, name


# -- cancellation ---------------------------------------------------------------------------------


class SimulatedHop(Transaction):
    """A hop that runs a function of a test, and rolls back in several steps."""

    def __init__(self, work: Callable[[SimulatedHop], Awaitable[None]], listener: Listener = events.ignore) -> None:
        super().__init__("guest", listener)
        self.work = work
        self.begun = asyncio.Event()
        self.rolling_back = asyncio.Event()
        self.rolled_back = False
        self.cleaned_up = False

    async def _script(self) -> None:
        self.rollback.push(self.undo_in_steps)
        await self.work(self)

    async def undo_in_steps(self) -> None:
        self.rolling_back.set()
        for _ in range(10):
            await asyncio.sleep(0)
        self.rolled_back = True


async def for_ever(hop: SimulatedHop) -> None:
    hop.begun.set()
    await asyncio.Event().wait()


def run(hop: SimulatedHop, cancel: Callable[[asyncio.Task[None]], Awaitable[None]]) -> None:
    """Run it as the interface does, and cancel it meanwhile."""

    async def work() -> None:
        task = asyncio.ensure_future(api._interruptible(hop, DeferringListener(events.ignore)))
        await cancel(task)
        await task

    asyncio.run(work())


def test_cancelled_hop_is_rolled_back() -> None:
    hop = SimulatedHop(for_ever)

    async def cancel(task: asyncio.Task[None]) -> None:
        await hop.begun.wait()
        task.cancel()

    with pytest.raises(asyncio.CancelledError):
        run(hop, cancel)
    assert (hop.rolled_back, hop.report.outcome) == (True, "rolled-back")


def test_cancelled_hop_is_rolled_back_when_cancelled_again() -> None:
    hop = SimulatedHop(for_ever)

    async def cancel(task: asyncio.Task[None]) -> None:
        await hop.begun.wait()
        task.cancel()
        await hop.rolling_back.wait()
        task.cancel()

    with pytest.raises(asyncio.CancelledError):
        run(hop, cancel)
    assert (hop.rolled_back, hop.report.outcome) == (True, "rolled-back")


def test_cancellation_during_a_rollback_keeps_the_error() -> None:
    async def fail(_: SimulatedHop) -> None:
        raise RolledBack("it failed")

    hop = SimulatedHop(fail)

    async def cancel(task: asyncio.Task[None]) -> None:
        await hop.rolling_back.wait()
        task.cancel()

    with pytest.raises(RolledBack, match="it failed"):
        run(hop, cancel)
    assert (hop.rolled_back, hop.report.reason) == (True, "it failed")


def test_cancellation_during_the_cleanup_keeps_the_error() -> None:
    async def fail(hop: SimulatedHop) -> None:
        hop.resources.push_async_callback(clean_up)
        raise RolledBack("it failed")

    async def clean_up() -> None:
        hop.begun.set()
        for _ in range(10):
            await asyncio.sleep(0)
        hop.cleaned_up = True

    hop = SimulatedHop(fail)

    async def cancel(task: asyncio.Task[None]) -> None:
        await hop.begun.wait()
        task.cancel()

    with pytest.raises(RolledBack, match="it failed"):
        run(hop, cancel)
    assert hop.cleaned_up


def test_cancelled_hop_is_completed_after_the_commit() -> None:
    async def commit(hop: SimulatedHop) -> None:
        hop.state = CommitState.COMMITTED
        hop.begun.set()
        for _ in range(10):
            await asyncio.sleep(0)

    hop = SimulatedHop(commit)

    async def cancel(task: asyncio.Task[None]) -> None:
        await hop.begun.wait()
        task.cancel()

    run(hop, cancel)
    assert (hop.rolled_back, hop.report.outcome) == (False, "done")


# -- listeners -------------------------------------------------------------------------------------


def test_events_are_deferred_while_a_guest_is_stopped() -> None:
    received: list[Event] = []
    listen = DeferringListener(received.append)
    report = Report()

    async def report_all() -> None:
        sent: list[Event] = [PhaseBegan("a", "stop")]
        listen(sent[0])
        assert received == sent
        for event in (GuestStopped("a"), GuestStopped("b"), PhaseBegan("c", "check"), GuestResumed("a", 1.0)):
            sent.append(event)
            listen(event)
            assert received == sent[:1]
        sent.append(HopFinished("b", report))  # it may not run, and there will be no further event of it
        listen(sent[-1])
        assert received == sent

    asyncio.run(report_all())


def test_events_are_deferred_for_a_limited_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MAX_DEFERRAL", 0.0)

    async def report_one() -> None:
        received = asyncio.Event()
        listen = DeferringListener(lambda _: received.set())
        listen(GuestStopped("a"))
        assert not received.is_set()
        await received.wait()

    asyncio.run(report_one())


def test_error_of_a_listener_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    received = []

    def listener(event: Event) -> None:
        received.append(event)
        raise BrokenPipeError

    listen = DeferringListener(listener)
    listen(PhaseBegan("a", "check"))
    listen(PhaseBegan("a", "acquire"))
    assert len(received) == 2
    assert "a listener has failed" in caplog.text


# -- arguments -------------------------------------------------------------------------------------


def test_wrong_arguments_raise_value_error() -> None:
    with pytest.raises(TypeError):
        asyncio.run(api.check())
    with pytest.raises(TypeError):
        asyncio.run(api.check("web", qmp="/run/qmp"))
    with pytest.raises(ValueError, match="0 jobs"):
        asyncio.run(api.upgrade_fleet(["web"], jobs=0))
    with pytest.raises(Refused):
        asyncio.run(api.hop("/nonexistent"))
