"""
The priority that a hop lends to threads, and who takes it back when the hop cannot any more.

This is also the program of :class:`sevhop.engine.realtime.Watch`: a process that waits for the command to end. It
starts while the guest and the destination want the processors as well, so it imports next to nothing.
"""

from __future__ import annotations

import os
import select
import sys

FIRST, SECOND = 2, 1
_POLICY = os.SCHED_RR | os.SCHED_RESET_ON_FORK
#: What adopt.so leaves where it may not do more.
_LEFT = os.SCHED_OTHER | os.SCHED_RESET_ON_FORK
_ORDINARY = os.sched_param(0)
#: The last that a watch is told by who has taken everything back.
DONE = b"done"


def lend(thread: int, priority: int) -> bool:
    """:return: whether the thread has it now; one with a policy of its own keeps that."""
    try:
        if os.sched_getscheduler(thread) == os.SCHED_OTHER:
            os.sched_setscheduler(thread, _POLICY, os.sched_param(priority))
            return True
    except OSError:  # it has ended, or the host forbids it
        pass
    return False


def take_back(thread: int) -> None:
    """Whatever policy it has."""
    try:  # noqa: SIM105 - contextlib takes longer than all of this
        os.sched_setscheduler(thread, os.SCHED_OTHER, _ORDINARY)
    except OSError:
        pass


def relax(threads: list[int]) -> None:
    """Take back what a command has left when it was killed in the middle."""
    for thread in threads:
        try:
            policy, priority = os.sched_getscheduler(thread), os.sched_getparam(thread).sched_priority
        except OSError:
            continue
        if policy == _LEFT or (policy == _POLICY and priority in (FIRST, SECOND)):
            take_back(thread)


def threads_of(process: int) -> list[int]:
    """None when it has ended."""
    try:
        return [int(name) for name in os.listdir(f"/proc/{process}/task")]
    except OSError:
        return []


def timer_slacks(threads: list[int]) -> dict[int, str]:
    """Nanoseconds, of those that have not ended."""
    found = {}
    for thread in threads:
        try:
            with open(f"/proc/{thread}/timerslack_ns", encoding="ascii") as file:
                found[thread] = file.read().strip()
        except OSError:
            pass
    return found


def set_timer_slacks(wanted: dict[int, str]) -> None:
    """Those that are others now."""
    found = timer_slacks(list(wanted))
    for thread, slack in wanted.items():
        if found.get(thread, slack) != slack:
            try:
                with open(f"/proc/{thread}/timerslack_ns", "w", encoding="ascii") as file:
                    file.write(slack)
            except OSError:
                pass


def described(process: int) -> bytes:
    """A process, and the timer slack of its threads: a line for a watch."""
    slacks = timer_slacks(threads_of(process))
    return (" ".join([str(process), *(f"{thread}={slack}" for thread, slack in slacks.items())]) + "\n").encode("ascii")


def main() -> None:
    """Wait for whoever holds the other end of standard input, then :func:`relax` what it has :func:`described`."""
    watched: dict[int, tuple[int, dict[int, str]]] = {}
    line = b""
    for line in iter(sys.stdin.buffer.readline, b""):
        if line != DONE:
            process, *slacks = line.decode("ascii").split()
            pairs = (word.partition("=") for word in slacks)
            try:  # noqa: SIM105
                watched[int(process)] = os.pidfd_open(int(process)), {int(thread): slack for thread, _, slack in pairs}
            except OSError:
                pass
    for process, (pidfd, before) in watched.items():
        # Readable when it has ended; then the number may be somebody else's.
        if not select.select([pidfd], [], [], 0)[0]:
            relax(threads_of(process))
            if line != DONE:
                set_timer_slacks(before)


if __name__ == "__main__":
    main()
