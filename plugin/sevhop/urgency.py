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
threads of both QEMUs when it sees us end; what adopt.so takes back does not depend on that. This file is its program.

A host may forbid all of it; then a hop takes longer, which is all.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Self

_FIRST, _SECOND = 2, 1
_POLICY = os.SCHED_RR | os.SCHED_RESET_ON_FORK
#: What adopt.so leaves where it may not do more.
_LEFT = os.SCHED_OTHER | os.SCHED_RESET_ON_FORK
_ORDINARY = os.sched_param(0)
#: The last that a watch is told by who has taken everything back.
_DONE = b"done"


@contextlib.contextmanager
def urgent(*threads: int, first: bool = False) -> Iterator[None]:
    """
    Meanwhile these threads go before others.

    :param threads: their ids; 0 is the one that calls. Those that have a policy of their own keep it.
    :param first: also before others that are urgent.
    """
    priority = _FIRST if first else _SECOND
    raised = [thread for thread in threads if _raise(thread, priority)]
    try:
        yield
    finally:
        for thread in raised:
            _lower(thread)


@contextlib.contextmanager
def keeping_timer_slack(*threads: int) -> Iterator[None]:
    """
    Around all that makes threads :func:`urgent`: a thread with a real-time priority has no timer slack, and afterwards
    it has the one that it began with (PR_SET_TIMERSLACK of prctl(2)), not the one that it has set.
    """
    slacks = _timer_slacks(threads)
    try:
        yield
    finally:
        _set_timer_slacks(slacks)


def relax(threads: Iterable[int]) -> None:
    """Take back what a command has left when it was killed in the middle."""
    for thread in threads:
        with contextlib.suppress(OSError):
            policy, priority = os.sched_getscheduler(thread), os.sched_getparam(thread).sched_priority
            if policy == _LEFT or (policy == _POLICY and priority in (_FIRST, _SECOND)):
                _lower(thread)


class Watch:
    """
    A process that waits for us to end, and then takes back what we have lent. :meth:`start` early, since that takes it
    some hundredths of a second of a processor; then :meth:`over`, and :meth:`close`.

    It is in a session of its own: what ends all of ours at once does not end it.
    """

    def __init__(self, child: subprocess.Popen[bytes] | None) -> None:
        self._child = child

    @classmethod
    def start(cls) -> Self:
        """Start one that watches nothing yet."""
        program = sys.executable or shutil.which("python3") or "/usr/bin/python3"
        try:
            return cls(
                subprocess.Popen(
                    [program, "-I", "-S", __file__],
                    cwd="/",
                    env={},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
            )
        except (OSError, subprocess.SubprocessError):
            return cls(None)  # sevhop recover takes it back as well

    def over(self, *processes: int) -> None:
        """
        What is lent to threads of these processes from now on is taken back, and they get the timer slack that they
        have now.
        """
        lines = []
        for process in processes:
            slacks = _timer_slacks(_threads(process))
            lines.append(" ".join([str(process), *(f"{thread}={slack}" for thread, slack in slacks.items())]))
        self._tell("".join(f"{line}\n" for line in lines).encode())

    async def close(self) -> None:
        """We are done: it takes back what is left, and ends."""
        if self._child is not None and self._child.stdin is not None:
            self._tell(_DONE)
            with contextlib.suppress(OSError):
                self._child.stdin.close()
            await asyncio.to_thread(self._child.wait)

    def _tell(self, text: bytes) -> None:
        if self._child is not None and self._child.stdin is not None:
            with contextlib.suppress(OSError):  # somebody has ended it
                os.write(self._child.stdin.fileno(), text)


def _raise(thread: int, priority: int) -> bool:
    with contextlib.suppress(OSError):
        if os.sched_getscheduler(thread) == os.SCHED_OTHER:
            os.sched_setscheduler(thread, _POLICY, os.sched_param(priority))
            return True
    return False


def _lower(thread: int) -> None:
    with contextlib.suppress(OSError):
        os.sched_setscheduler(thread, os.SCHED_OTHER, _ORDINARY)


def _timer_slacks(threads: Iterable[int]) -> dict[int, str]:
    """Nanoseconds."""
    found = {}
    for thread in threads:
        with contextlib.suppress(OSError), open(f"/proc/{thread}/timerslack_ns", encoding="ascii") as file:
            found[thread] = file.read().strip()
    return found


def _set_timer_slacks(wanted: dict[int, str]) -> None:
    found = _timer_slacks(wanted)
    for thread, slack in wanted.items():
        if found.get(thread, slack) != slack:
            with contextlib.suppress(OSError), open(f"/proc/{thread}/timerslack_ns", "w", encoding="ascii") as file:
                file.write(slack)


def _threads(process: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(name) for name in os.listdir(f"/proc/{process}/task")]
    return []


def _watch() -> None:
    """Wait for whoever holds the other end of standard input, then :func:`relax`."""
    watched: dict[int, tuple[int, dict[int, str]]] = {}
    line = b""
    for line in iter(sys.stdin.buffer.readline, b""):
        if line != _DONE:
            process, *slacks = line.decode("ascii").split()
            with contextlib.suppress(OSError):
                watched[int(process)] = os.pidfd_open(int(process)), _parsed(slacks)
    for process, (pidfd, slacks_before) in watched.items():
        # Readable when it has ended; then the number may be somebody else's.
        if not select.select([pidfd], [], [], 0)[0]:
            relax(_threads(process))
            if line != _DONE:
                _set_timer_slacks(slacks_before)


def _parsed(slacks: Iterable[str]) -> dict[int, str]:
    pairs = (word.partition("=") for word in slacks)
    return {int(thread): slack for thread, _, slack in pairs}


if __name__ == "__main__":
    _watch()
