"""
While a guest stands still, who lets it go on is not kept waiting.

A hop is a conversation of three processes, each of which waits for another nearly all of the time. On a busy host every
answer is late by some milliseconds, since whoever is to give it has to wait for a processor first. So for that moment
the main threads of both QEMUs, which answer, and our own have a real-time priority, the lowest there is (sched(7)).
The guest's processors and whatever threads are started meanwhile keep theirs.

A host may forbid it; then a hop takes longer, which is all.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator

_PRIORITY = 1
_POLICY = os.SCHED_RR | os.SCHED_RESET_ON_FORK
_ORDINARY = os.sched_param(0)


@contextlib.contextmanager
def urgent(threads: Iterable[int] = ()) -> Iterator[None]:
    """
    Meanwhile these threads, and the one that calls, go before others.

    :param threads: ids of threads, or of processes, whose main threads are meant. Those that have a policy of their
        own keep it.
    """
    raised = [thread for thread in (0, *threads) if _raise(thread)]
    try:
        yield
    finally:
        for thread in raised:
            _lower(thread)


def relax(process: int) -> None:
    """Take back what a command has left in a process that was killed in the middle."""
    with contextlib.suppress(OSError):
        if os.sched_getscheduler(process) == _POLICY and os.sched_getparam(process).sched_priority == _PRIORITY:
            _lower(process)


def _raise(thread: int) -> bool:
    with contextlib.suppress(OSError):
        if os.sched_getscheduler(thread) == os.SCHED_OTHER:
            os.sched_setscheduler(thread, _POLICY, os.sched_param(_PRIORITY))
            return True
    return False


def _lower(thread: int) -> None:
    with contextlib.suppress(OSError):
        os.sched_setscheduler(thread, os.SCHED_OTHER, _ORDINARY)
