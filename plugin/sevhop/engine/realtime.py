"""
While a guest stands still, who lets it go on is not kept waiting.

A hop is a conversation of three processes, each of which waits for another nearly all of the time. On a busy host every
answer is late by some milliseconds, since whoever is to give it has to wait for a processor first. So for that moment
the threads of both QEMUs and our own have a real-time priority, one of the two lowest (sched(7)): the one that reads a
monitor, the one that does what it is told, and those that are the guest's processors, since each of these is asked for
its state several times. None has it while the guest runs, but for the main thread, which is to stop it: whoever has it
runs at once where it wakes up, and a processor of the guest would have to wait there although another one of the host
may be idle. So the source's threads get it when the guest has stopped, adopt.so takes it from the destination's before
the guest runs, and ours ends when nobody waits for us any more. The source's threads go first: all others wait for the
state that they save, and have something else to do meanwhile, which can wait on a host with few processors.

It must not outlast us, whatever ends us. So a :class:`Watch`, a process that does nothing else, takes it back from the
threads of both QEMUs when it sees us end; what adopt.so takes back does not depend on that.

A host may forbid all of it; then a hop takes longer, which is all.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from . import realtime_reset

_PROGRAM = Path(realtime_reset.__file__)


@contextlib.contextmanager
def urgent(*threads: int, first: bool = False) -> Iterator[None]:
    """
    Meanwhile these threads go before others.

    :param threads: their ids; 0 is the one that calls. Those that have a policy of their own keep it.
    :param first: also before others that are urgent.
    """
    priority = realtime_reset.FIRST if first else realtime_reset.SECOND
    raised = [thread for thread in threads if realtime_reset.lend(thread, priority)]
    try:
        yield
    finally:
        for thread in raised:
            realtime_reset.take_back(thread)


@contextlib.contextmanager
def keeping_timer_slack(*threads: int) -> Iterator[None]:
    """
    Around all that makes threads :func:`urgent`: a thread with a real-time priority has no timer slack, and afterwards
    it has the one that it began with (PR_SET_TIMERSLACK of prctl(2)), not the one that it has set.
    """
    slacks = realtime_reset.timer_slacks(list(threads))
    try:
        yield
    finally:
        realtime_reset.set_timer_slacks(slacks)


class Watch:
    """
    A process that waits for us to end, and then takes back what we have lent. :meth:`start` early, since that takes it
    some milliseconds of a processor; then :meth:`over`, and :meth:`close`.

    It is in a session of its own: what ends all of ours at once does not end it.
    """

    def __init__(self, child: subprocess.Popen[bytes] | None) -> None:
        self._child = child

    @classmethod
    def start(cls) -> Self:
        """Start one that watches nothing yet."""
        program = sys.executable or shutil.which("python3") or "/usr/bin/python3"
        try:
            child = subprocess.Popen(
                [program, "-I", "-S", str(_PROGRAM)],
                cwd="/",
                env={},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except (OSError, subprocess.SubprocessError):
            return cls(None)  # sevhop recover takes it back as well
        return cls(child)

    def over(self, *processes: int) -> None:
        """
        What is lent to threads of these processes from now on is taken back, and they get the timer slack that they
        have now.
        """
        self._tell(b"".join(map(realtime_reset.described, processes)))

    async def close(self) -> None:
        """We are done: it takes back what is left, and ends."""
        if self._child is not None and self._child.stdin is not None:
            self._tell(realtime_reset.DONE)
            with contextlib.suppress(OSError):
                self._child.stdin.close()
            await asyncio.to_thread(self._child.wait)

    def _tell(self, text: bytes) -> None:
        if self._child is not None and self._child.stdin is not None:
            with contextlib.suppress(OSError):  # somebody has ended it
                os.write(self._child.stdin.fileno(), text)
