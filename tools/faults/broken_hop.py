"""
A hop in which something goes wrong: run as a program, so that it may be killed.

It hops like ``sevhop hop``, and there is a fault just before or just after one of the commands that it gives to a QEMU,
or at the beginning of a phase::

    python -m faults.broken_hop MONITOR EMULATOR POINT FAULT

A point is ``before COMMAND N``, ``after COMMAND N`` (the N-th such command, from 0), or ``phase NAME``. A fault is

===============  =================================================
``command``      this process is killed
``source``       its QEMU is killed
``destination``  the new QEMU is killed, if there is one
``error``        QEMU refuses the command (points ``before`` only)
``silence``      QEMU does not answer it in time (likewise)
``none``         none
===============  =================================================

With the point ``list`` all points are printed. Exit status: 0 done, 1 refused, 3 undone, 4 needs ``sevhop recover``,
5 lost.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sevhop.cli import EXIT_DONE, exit_status
from sevhop.hop import Hop, Options
from sevhop.procedure import Phase
from sevhop_qmp.errors import CommandError, MonitorTimeout, SevhopError
from sevhop_qmp.monitor import Monitor

FAULTS = ("command", "source", "destination", "error", "silence")

#: While these points are passed, all that there is of the guest is in the source.
BEFORE_THE_STATE_IS_SAVED = (
    "phase hold",
    "phase prepare",
    "before migrate-incoming 0",
    "after migrate-incoming 0",
    "after add-fd 0",
    "phase freeze",
    "before stop 0",
    "after stop 0",
    "after query-status 2",
    "before x-sev-adopt-ram 0",
    "after x-sev-adopt-ram 0",
    "phase save",
    "before xen-save-devices-state 0",
)
#: And from here on in the destination, too.
SAVED = (
    "after xen-save-devices-state 0",
    "phase load",
    "before query-status 3",
    "phase commit",
    "after query-status 4",
    "phase resume",
    "before cont 0",
)
#: From here on it runs there.
RUNNING = (
    "after cont 0",
    "phase retire",
    "before quit 0",
    "after quit 0",
    "before x-sev-adopt-finish 0",
    "after x-sev-adopt-finish 0",
)


class BrokenHop:
    """A hop, and a fault at one point."""

    def __init__(self, monitor: str, emulator: str, point: str, fault: str) -> None:
        self._point = point
        self._fault = fault
        self._given: Counter[str] = Counter()
        self._hop = Hop(Options(Path(monitor), emulator=emulator, start_timeout=60.0), self._begun)

    def run(self) -> int:
        """Hop. :return: the exit status."""
        execute = Monitor.execute

        async def watched(
            monitor: Monitor, command: str, arguments: Mapping[str, object] | None = None, **options: Any
        ) -> Any:
            number = self._given[command]
            self._given[command] += 1
            if self._at(f"before {command} {number}"):
                if self._fault == "error":
                    raise CommandError(command, "refused for a test")
                if self._fault == "silence":
                    raise MonitorTimeout(f"QEMU did not answer {command}, for a test")
            answer = await execute(monitor, command, arguments, **options)
            self._at(f"after {command} {number}")
            return answer

        Monitor.execute = watched  # type: ignore[method-assign, assignment]
        try:
            asyncio.run(self._hop.run())
        except SevhopError as err:
            print(type(err).__name__, err, flush=True)
            return exit_status(err)
        return EXIT_DONE

    def _begun(self, phase: str | Phase) -> None:
        if isinstance(phase, str):
            self._at(f"phase {phase}")

    def _at(self, point: str) -> bool:
        if self._point == "list":
            print(point, flush=True)
        if point != self._point:
            return False
        match self._fault:
            case "command":
                os.kill(os.getpid(), signal.SIGKILL)
            case "source":
                _kill(self._hop.report.source_pid)
            case "destination":
                _kill(self._hop.report.destination_pid)
        return True


def _kill(pid: int) -> None:
    if not pid:
        return
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        # Readable when it has ended; whether anybody has waited for it does not matter.
        select.select([handle], [], [])
    finally:
        os.close(handle)


if __name__ == "__main__":
    sys.exit(BrokenHop(*sys.argv[1:5]).run())
