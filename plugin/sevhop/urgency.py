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

A host may forbid it; then a hop takes longer, which is all.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator

_FIRST, _SECOND = 2, 1
_POLICY = os.SCHED_RR | os.SCHED_RESET_ON_FORK
_ORDINARY = os.sched_param(0)


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


def relax(threads: Iterable[int]) -> None:
    """Take back what a command has left when it was killed in the middle."""
    for thread in threads:
        with contextlib.suppress(OSError):
            priority = os.sched_getparam(thread).sched_priority
            if os.sched_getscheduler(thread) == _POLICY and priority in (_FIRST, _SECOND):
                _lower(thread)


def _raise(thread: int, priority: int) -> bool:
    with contextlib.suppress(OSError):
        if os.sched_getscheduler(thread) == os.SCHED_OTHER:
            os.sched_setscheduler(thread, _POLICY, os.sched_param(priority))
            return True
    return False


def _lower(thread: int) -> None:
    with contextlib.suppress(OSError):
        os.sched_setscheduler(thread, os.SCHED_OTHER, _ORDINARY)
