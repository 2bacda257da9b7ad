"""Hops from a test: the command, and the engine itself, with something that happens when a phase begins."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytest
from sevhop.engine.check import Acquired, Checked
from sevhop.engine.hop import Hop
from sevhop.engine.prepare import Prepared
from sevhop.events import Event, PhaseBegan
from sevhop.options import HopOptions
from sevhop.report import Report
from sevhop_qmp.monitor import Monitor

from tests.support.guests.running import Guest

#: Phases of a hop between the start of the destination and the commit; that of a guest without SEV ends "load".
BEFORE_COMMIT = ("stop", "map", "save", "load")

#: What strace prints of the order to stop, and of the end of the stream: of the state, and an empty section of type 6.
STOP = r"{\"execute\":\"stop\""
STREAM_END = r'"\0\6\0\0\0\0", 6)'

Answer = TypeVar("Answer")

#: Called when a phase begins.
Fault = Callable[["ObservedHop"], None]


def sevhop(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command, as a user calls it."""
    return subprocess.run(
        [sys.executable, "-m", "sevhop.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


class ObservedHop(Hop):
    """A hop whose results a test can reach."""

    checked: Checked
    acquired: Acquired
    prepared: Prepared

    async def run_phase(self, name: str, work: Coroutine[Any, Any, Answer]) -> Answer:
        result = await super().run_phase(name, work)
        match result:
            case Checked():
                self.checked = result
            case Acquired():
                self.acquired = result
            case Prepared():
                self.prepared = result
        return result


def followed_by(step: Callable[..., Awaitable[Answer]], act: Callable[[], object]) -> Callable[..., Awaitable[Answer]]:
    """A step of the engine, to be put in its place, after which something happens."""

    async def both(*arguments: Any, **options: Any) -> Answer:
        result = await step(*arguments, **options)
        act()
        return result

    return both


def observe_commands(
    patch: pytest.MonkeyPatch,
    before: Callable[[str, Mapping[str, object]], object],
    after: Callable[[], object] = lambda: None,
) -> None:
    """Have something called before each QMP command of the engine, and after it."""
    execute = Monitor.execute

    async def observed(
        self: Monitor, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float | None = None
    ) -> Any:
        before(command, arguments or {})
        try:
            return await execute(self, command, arguments, timeout=timeout)
        finally:
            after()

    patch.setattr(Monitor, "execute", observed)


class HopDriver:
    """Hops guests, and injects a fault when one phase begins."""

    def __init__(self) -> None:
        self.hop: ObservedHop
        self.phases: list[str] = []

    def run(
        self,
        guest: Guest,
        emulator: Path | None,
        *,
        at: str = "",
        fault: Fault = lambda _: None,
        command: list[str] | None = None,
        timeout: float = 10.0,
        start_timeout: float = 60.0,
        move_deadline: float = 2.0,
    ) -> Report:
        """
        Hop a guest.

        :param at: the phase at whose beginning ``fault`` is called.
        :param timeout: seconds for each step.
        """

        def listener(event: Event) -> None:
            if isinstance(event, PhaseBegan):
                self.phases.append(event.phase)
                if event.phase == at:
                    fault(self.hop)

        options = HopOptions(
            emulator=str(emulator) if emulator else None,
            command=command,
            step_timeout=timeout,
            start_timeout=start_timeout,
            move_deadline=move_deadline,
        )
        self.hop = ObservedHop(guest.machine.monitor, options, listener)
        return asyncio.run(self.hop.run())


def hop(guest: Guest, emulator: Path) -> Report:
    """Hop a guest that is expected to arrive."""
    report = HopDriver().run(guest, emulator)
    assert report.outcome == "done"
    assert not report.notes
    return report


def kill_source(hop: Hop) -> None:
    """The source dies. The next thing the engine does finds it dead."""
    _kill(hop.report.source_pid)


def kill_destination(hop: Hop) -> None:
    """The destination dies."""
    _kill(hop.report.destination_pid)


def hang_destination(hop: Hop) -> None:
    """The destination answers no more."""
    os.kill(hop.report.destination_pid, signal.SIGSTOP)


def interrupt(hop: Hop) -> None:
    """What SIGINT and SIGTERM do."""
    assert hop.interrupt()


def _kill(pid: int) -> None:
    handle = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        # Readable when it has exited, reaped or not.
        assert select.select([handle], [], [], 10)[0]
    finally:
        os.close(handle)


def assert_unharmed(guest: Guest, ticks: int = 10) -> None:
    """The guest counts on, and has counted without a missing tick from its start to now."""
    guest.wait_for_ticks(ticks)
    verdict = guest.stop()
    assert verdict.unharmed, verdict
