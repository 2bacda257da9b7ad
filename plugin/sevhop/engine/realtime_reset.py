"""
The realtime priority of boosted threads, and how it is reset, also when the command was killed.

This is also the program of :class:`sevhop.engine.realtime.Watchdog`: a process that waits for the command to exit. It
starts while the guest and the destination want the processors as well, so it imports next to nothing.
"""

from __future__ import annotations

import os
import select
import sys

FIRST, SECOND = 2, 1
_POLICY = os.SCHED_RR | os.SCHED_RESET_ON_FORK
#: What adopt.so leaves where it may not reset the flag.
_LEFT = os.SCHED_OTHER | os.SCHED_RESET_ON_FORK
_ORDINARY = os.sched_param(0)
#: The last line to a watchdog, when everything was reset already.
DONE = b"done"


def boost(thread: int, priority: int) -> bool:
    """:return: whether the thread is boosted now; one with a policy of its own keeps that."""
    try:
        if os.sched_getscheduler(thread) == os.SCHED_OTHER:
            os.sched_setscheduler(thread, _POLICY, os.sched_param(priority))
            return True
    except OSError:  # it has exited, or the host forbids it
        pass
    return False


def reset(thread: int) -> None:
    """Give a thread the ordinary policy, whatever it has now."""
    try:  # noqa: SIM105 - contextlib takes longer than all of this
        os.sched_setscheduler(thread, os.SCHED_OTHER, _ORDINARY)
    except OSError:
        pass


def reset_boosted(threads: list[int]) -> None:
    """Reset those threads that a command has left boosted when it was killed."""
    for thread in threads:
        try:
            policy, priority = os.sched_getscheduler(thread), os.sched_getparam(thread).sched_priority
        except OSError:
            continue
        if policy == _LEFT or (policy == _POLICY and priority in (FIRST, SECOND)):
            reset(thread)


def threads_of(process: int) -> list[int]:
    """Its thread ids; none when it has exited."""
    try:
        return [int(name) for name in os.listdir(f"/proc/{process}/task")]
    except OSError:
        return []


def timer_slacks(threads: list[int]) -> dict[int, str]:
    """In nanoseconds, of those threads that have not exited."""
    found = {}
    for thread in threads:
        try:
            with open(f"/proc/{thread}/timerslack_ns", encoding="ascii") as file:
                found[thread] = file.read().strip()
        except OSError:
            pass
    return found


def set_timer_slacks(wanted: dict[int, str]) -> None:
    """Set the timer slack of those threads that have another one now."""
    found = timer_slacks(list(wanted))
    for thread, slack in wanted.items():
        if found.get(thread, slack) != slack:
            try:
                with open(f"/proc/{thread}/timerslack_ns", "w", encoding="ascii") as file:
                    file.write(slack)
            except OSError:
                pass


def watch_line(process: int) -> bytes:
    """A process, and the timer slack of its threads: a line for a watchdog."""
    slacks = timer_slacks(threads_of(process))
    return (" ".join([str(process), *(f"{thread}={slack}" for thread, slack in slacks.items())]) + "\n").encode("ascii")


def main() -> None:
    """Wait for end of file on standard input, then reset the threads of the processes that :func:`watch_line` named."""
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
        # Readable when it has exited; then the pid may have been reused.
        if not select.select([pidfd], [], [], 0)[0]:
            reset_boosted(threads_of(process))
            if line != DONE:
                set_timer_slacks(before)


if __name__ == "__main__":
    main()
