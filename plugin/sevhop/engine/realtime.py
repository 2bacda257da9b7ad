"""
Boost the threads that take part in a hop during the downtime, so that a busy host does not prolong it.

A hop is a conversation of three processes, each of which waits for another nearly all of the time. On a busy host every
answer is late by some milliseconds, since the thread that gives it has to wait for a processor first. So during the
downtime the threads of both QEMUs and our own have a realtime priority (SCHED_RR, see sched_setscheduler(2)), one of
the two lowest: the one that reads a monitor, the one that executes the commands, and the vCPU threads, since each of
these is asked for its state several times. None is boosted while the guest runs, but for the main thread, which has to
stop it: a boosted thread runs at once where it wakes up, and a vCPU would have to wait there although another processor
of the host may be idle. So the source's threads are boosted when the guest has stopped, adopt.so resets the
destination's before the guest runs, and ours is reset when nobody waits for us any more. The source's threads come
first: all others wait for the state that they save, and have something else to do meanwhile, which can wait on a host
with few processors.

No boost may outlast us, even if we are killed. So a :class:`Watchdog`, a process that does nothing else, resets the
threads of both QEMUs when it sees us exit; what adopt.so resets does not depend on that.

A host may forbid all of it; then a hop only takes longer.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

from . import realtime_reset

_PROGRAM = Path(realtime_reset.__file__)


@contextlib.contextmanager
def boosted(*threads: int, first: bool = False) -> Iterator[None]:
    """
    Boost threads meanwhile.

    :param threads: their ids; 0 is the calling one. Those that have a policy of their own keep it.
    :param first: with the higher priority, before other boosted threads.
    """
    priority = realtime_reset.FIRST if first else realtime_reset.SECOND
    raised = [thread for thread in threads if realtime_reset.boost(thread, priority)]
    try:
        yield
    finally:
        for thread in raised:
            realtime_reset.reset(thread)


@contextlib.contextmanager
def timer_slack_restored(*threads: int) -> Iterator[None]:
    """
    Around everything :func:`boosted`: a thread with a realtime priority has no timer slack, and afterwards it has its
    default (PR_SET_TIMERSLACK of prctl(2)), not the one that it has set.
    """
    slacks = realtime_reset.timer_slacks(list(threads))
    try:
        yield
    finally:
        realtime_reset.set_timer_slacks(slacks)


class Boost:
    """
    The realtime priority of all threads in one hop: given step by step while the guest is stopped, reset together. A
    context manager; what is left in the end is reset.

    :param threads: whose timer slack is restored in the end.
    """

    def __init__(self, threads: Iterable[int]) -> None:
        self._stack = contextlib.ExitStack()
        self._slack = self._stack.enter_context(contextlib.ExitStack())
        self._others = self._stack.enter_context(contextlib.ExitStack())
        self._ours = self._stack.enter_context(contextlib.ExitStack())
        self._slack.enter_context(timer_slack_restored(*threads))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def source(self, threads: Iterable[int]) -> None:
        """Boost threads of the source, before all others: these wait for the state that the source saves."""
        self._others.enter_context(boosted(*threads, first=True))

    def destination(self, threads: Iterable[int]) -> None:
        """Boost threads of the destination."""
        self._others.enter_context(boosted(*threads))

    def ourselves(self) -> None:
        """Boost the calling thread."""
        self._ours.enter_context(boosted(0))

    def reset_ourselves(self) -> None:
        """Nobody waits for us any more."""
        self._ours.close()

    def reset(self) -> None:
        """The guest runs, or is about to: nobody has a priority that it did not have before."""
        self._others.close()
        self._ours.close()

    def reset_all(self) -> None:
        """The same, with the timer slack."""
        self._stack.close()


class Watchdog:
    """
    A process that waits for us to exit, and then resets the threads that we have boosted. :meth:`start` early, since
    that takes some milliseconds of CPU time; then :meth:`watch`, and :meth:`close`.

    It is in a session of its own: what terminates all of ours at once does not terminate it.
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
            return cls(None)  # sevhop recover resets them as well
        return cls(child)

    def watch(self, *processes: int) -> None:
        """
        Threads of these processes that are boosted from now on will be reset, and get the timer slack that they have
        now.
        """
        self._send(b"".join(map(realtime_reset.watch_line, processes)))

    async def close(self) -> None:
        """We are done: it resets what is left, and exits."""
        if self._child is not None and self._child.stdin is not None:
            self._send(realtime_reset.DONE)
            with contextlib.suppress(OSError):
                self._child.stdin.close()
            await asyncio.to_thread(self._child.wait)

    def _send(self, text: bytes) -> None:
        if self._child is not None and self._child.stdin is not None:
            with contextlib.suppress(OSError):  # somebody has terminated it
                os.write(self._child.stdin.fileno(), text)
