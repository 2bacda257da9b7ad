"""What the interface for Python promises: what importing it costs, cancelling, and when a listener is called."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable

import pytest
from sevhop import api, events
from sevhop.engine.transaction import Procedure
from sevhop.errors import Refused, Undone
from sevhop.events import Ended, Event, GuestRuns, GuestStopped, Listener, PhaseBegan, Unhurried
from sevhop.report import Report


@pytest.mark.parametrize(
    ("module", "without"), [("sevhop", ["asyncio", "sevhop_qmp"]), ("sevhop.api", ["libvirt", "rich", "argparse"])]
)
def test_what_is_not_imported(module: str, without: list[str]) -> None:
    program = f"import sys, {module}; print(*(name for name in {without} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_every_public_name_is_there_and_documented() -> None:
    assert api.__all__ == sorted(api.__all__, key=lambda name: (name.islower(), name))
    for name in api.__all__:
        assert name == "Listener" or getattr(api, name).__doc__, name


# -- cancelling ------------------------------------------------------------------------------------


class Played(Procedure):
    """A hop that does what a test says, and undoes in several steps."""

    def __init__(self, do: Callable[[Played], Awaitable[None]], listener: Listener = events.ignore) -> None:
        super().__init__("guest", listener)
        self.do = do
        self.too_late = False
        self.begun = asyncio.Event()
        self.undoing = asyncio.Event()
        self.undone = False
        self.cleaned_up = False

    def _past_undoing(self) -> bool:
        return self.too_late

    async def _go(self) -> None:
        try:
            await self.do(self)
        except BaseException as err:
            await self._in_full(self.undo())
            if isinstance(err, asyncio.CancelledError):
                raise api.Interrupted("interrupted") from err
            raise

    async def undo(self) -> None:
        self.undoing.set()
        for _ in range(10):
            await asyncio.sleep(0)
        self.undone = True


async def for_ever(hop: Played) -> None:
    hop.begun.set()
    await asyncio.Event().wait()


def carried_out(hop: Played, cancel: Callable[[asyncio.Task[None]], Awaitable[None]]) -> None:
    """Carry it out as the interface does, and cancel it meanwhile."""

    async def all_of_it() -> None:
        task = asyncio.ensure_future(api._interruptible(hop, Unhurried(events.ignore)))
        await cancel(task)
        await task

    asyncio.run(all_of_it())


def test_cancelled_means_undone() -> None:
    hop = Played(for_ever)

    async def cancel(task: asyncio.Task[None]) -> None:
        await hop.begun.wait()
        task.cancel()

    with pytest.raises(asyncio.CancelledError):
        carried_out(hop, cancel)
    assert (hop.undone, hop.report.outcome) == (True, "undone")


def test_cancelled_again_while_it_is_undone() -> None:
    hop = Played(for_ever)

    async def cancel(task: asyncio.Task[None]) -> None:
        await hop.begun.wait()
        task.cancel()
        await hop.undoing.wait()
        task.cancel()

    with pytest.raises(asyncio.CancelledError):
        carried_out(hop, cancel)
    assert (hop.undone, hop.report.outcome) == (True, "undone")


def test_cancelled_while_a_failure_is_undone() -> None:
    async def fail(_: Played) -> None:
        raise Undone("it failed")

    hop = Played(fail)

    async def cancel(task: asyncio.Task[None]) -> None:
        await hop.undoing.wait()
        task.cancel()

    with pytest.raises(Undone, match="it failed"):
        carried_out(hop, cancel)
    assert (hop.undone, hop.report.reason) == (True, "it failed")


def test_cancelled_while_it_is_cleaned_up_after_a_failure() -> None:
    async def fail(hop: Played) -> None:
        hop._resources.push_async_callback(clean_up)
        raise Undone("it failed")

    async def clean_up() -> None:
        hop.begun.set()
        for _ in range(10):
            await asyncio.sleep(0)
        hop.cleaned_up = True

    hop = Played(fail)

    async def cancel(task: asyncio.Task[None]) -> None:
        await hop.begun.wait()
        task.cancel()

    with pytest.raises(Undone, match="it failed"):
        carried_out(hop, cancel)
    assert hop.cleaned_up


def test_cancelled_too_late() -> None:
    async def commit(hop: Played) -> None:
        hop.too_late = True
        hop.begun.set()
        for _ in range(10):
            await asyncio.sleep(0)

    hop = Played(commit)

    async def cancel(task: asyncio.Task[None]) -> None:
        await hop.begun.wait()
        task.cancel()

    carried_out(hop, cancel)
    assert (hop.undone, hop.report.outcome) == (False, "done")


# -- listening -------------------------------------------------------------------------------------


def test_nothing_is_told_while_a_guest_is_stopped() -> None:
    heard: list[Event] = []
    listen = Unhurried(heard.append)
    report = Report()

    async def tell() -> None:
        told: list[Event] = [PhaseBegan("a", "freeze")]
        listen(told[0])
        assert heard == told
        for event in (GuestStopped("a"), GuestStopped("b"), PhaseBegan("c", "check"), GuestRuns("a", 1.0)):
            told.append(event)
            listen(event)
            assert heard == told[:1]
        told.append(Ended("b", report))  # it is not known to run, and will not be heard of again
        listen(told[-1])
        assert heard == told

    asyncio.run(tell())


def test_a_long_pause_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "LONGEST", 0.0)

    async def tell() -> None:
        told = asyncio.Event()
        listen = Unhurried(lambda _: told.set())
        listen(GuestStopped("a"))
        assert not told.is_set()
        await told.wait()

    asyncio.run(tell())


def test_a_listener_that_fails_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    heard = []

    def listener(event: Event) -> None:
        heard.append(event)
        raise BrokenPipeError

    listen = Unhurried(listener)
    listen(PhaseBegan("a", "check"))
    listen(PhaseBegan("a", "hold"))
    assert len(heard) == 2
    assert "a listener has failed" in caplog.text


# -- arguments -------------------------------------------------------------------------------------


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError):
        asyncio.run(api.check())
    with pytest.raises(TypeError):
        asyncio.run(api.check("web", source="/run/qmp"))
    with pytest.raises(ValueError, match="0 jobs"):
        asyncio.run(api.upgrade_fleet(["web"], jobs=0))
    with pytest.raises(Refused):
        asyncio.run(api.hop("/nonexistent"))
