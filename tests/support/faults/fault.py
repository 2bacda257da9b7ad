"""
A fault: at which point of a hop, and what happens there. Shared by :mod:`.broken_hop` and :mod:`.broken_upgrade`.

A point is ``before ACTION N``, ``after ACTION N`` (the N-th such action, from 0), or ``phase NAME``.

===============  ================================================================
``command``      the command that hops is killed
``source``       the old QEMU is killed
``destination``  the new QEMU is killed, if there is one
``keeper``       the keeper of a domain is killed
``daemon``       the libvirt daemon is killed
``error``        what is to be done is refused (points ``before`` only)
``silence``      it is not answered in time (likewise)
``stall``        the old QEMU hangs: it is stopped, and executes nothing until SIGCONT
``none``         nothing happens
===============  ================================================================
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from sevhop.cli.exit_codes import EXIT_DONE, EXIT_OF
from sevhop.engine.transaction import Transaction
from sevhop.events import Event, PhaseBegan
from sevhop_qmp.errors import SevhopError

Answer = TypeVar("Answer")

#: Instead of a point: print all that are passed.
LIST = "list"


class Fault:
    """
    One fault at one point.

    :param victims: whom a fault kills: its pid, 0 if there is none.
    :param passed: called at each point, before the fault.
    """

    def __init__(
        self,
        point: str,
        kind: str,
        victims: Mapping[str, Callable[[], int]],
        passed: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._point = point
        self._kind = kind
        self._passed = passed
        self._victims = {"command": os.getpid, **victims}
        self._done: Counter[str] = Counter()

    def heard(self, event: Event) -> None:
        """The listener of the hop."""
        if isinstance(event, PhaseBegan):
            self._at(f"phase {event.phase}")

    async def around(
        self, action: str, do: Callable[[], Awaitable[Answer]], error: SevhopError, silence: SevhopError
    ) -> Answer:
        """
        Do something, with the fault before or after it.

        :param error: raised instead if the fault is an ``error``; ``silence`` likewise.
        """
        number = self._done[action]
        self._done[action] += 1
        if self._at(f"before {action} {number}"):
            if self._kind == "error":
                raise error
            if self._kind == "silence":
                raise silence
        answer = await do()
        self._at(f"after {action} {number}")
        return answer

    def _at(self, point: str) -> bool:
        if self._point == LIST:
            print(point, flush=True)
        self._passed(point)
        if point != self._point:
            return False
        if self._kind in self._victims:
            kill(self._victims[self._kind]())
        elif self._kind == "stall":
            os.kill(self._victims["source"](), signal.SIGSTOP)
        return True


def kill(pid: int) -> None:
    """Kill a process and wait until it has ended."""
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


def patched(owner: Any, name: str, replacement: Callable[..., Awaitable[Any]]) -> None:
    """Put something around a coroutine function; ``replacement`` is given the original first."""
    original = getattr(owner, name)

    async def around(*arguments: Any, **options: Any) -> Any:
        return await replacement(original, *arguments, **options)

    setattr(owner, name, around)


def run(procedure: Transaction) -> int:
    """Hop. :return: the exit status of the command that hops so."""
    try:
        asyncio.run(procedure.run())
    except SevhopError as err:
        print(type(err).__name__, err, flush=True)
    return EXIT_OF.get(procedure.report.outcome, EXIT_DONE)
