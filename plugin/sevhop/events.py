"""
What is told of hops while they are under way.

========================  ==========================================================================================
:class:`Chosen`           these domains are going to be upgraded, in this order
:class:`PhaseBegan`       a phase begins; they are listed in :mod:`sevhop.engine.hop` and :mod:`sevhop.engine.upgrade`
:class:`PhaseEnded`       it is over, well or not
:class:`GuestStopped`     the guest is about to be stopped, for the rehearsal or for good
:class:`GuestRuns`        it runs again, wherever
:class:`MoveTried`        the kernel was asked to move the SEV context
:class:`Ended`            the hop is over, with its report
========================  ==========================================================================================

The engines tell at once, from the middle of a blackout. Whoever listens from outside does so through
:class:`Unhurried`, and cannot make a pause longer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from .report import Report

log = logging.getLogger(__name__)

#: Seconds for which events are kept back at most.
LONGEST = 1.0


@dataclass(frozen=True, kw_only=True)
class Event:
    """
    Something has happened.

    :ivar at: when, by :func:`time.monotonic`.
    """

    at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Chosen(Event):
    """Domains are going to be upgraded, in this order; it is the first event of a fleet."""

    domains: tuple[str, ...]


@dataclass(frozen=True)
class GuestEvent(Event):
    """
    Something has happened to one guest.

    :ivar guest: as the caller has named it: a domain, or the path of a QMP socket.
    """

    guest: str


@dataclass(frozen=True)
class PhaseBegan(GuestEvent):
    """A phase begins."""

    phase: str


@dataclass(frozen=True)
class PhaseEnded(GuestEvent):
    """A phase is over, also by failure, after so many milliseconds."""

    phase: str
    ms: float


@dataclass(frozen=True)
class GuestStopped(GuestEvent):
    """The guest is about to be stopped."""


@dataclass(frozen=True)
class GuestRuns(GuestEvent):
    """The guest runs again, after so many milliseconds."""

    ms: float


@dataclass(frozen=True)
class MoveTried(GuestEvent):
    """
    The kernel was asked to move the SEV context. Of a domain only the last attempt is told of: its keeper makes them.

    :ivar attempt: counts from 1.
    :ivar errno: the kernel's; 0 when the context was moved.
    """

    attempt: int
    errno: int


@dataclass(frozen=True)
class Ended(GuestEvent):
    """A hop is over, whatever it came to; it is the last event of its guest."""

    report: Report


Listener = Callable[[Event], None]


def ignore(_: Event) -> None:
    """A listener for whom nothing is of interest."""


class Unhurried:
    """
    A listener that passes events on in their order, but while a guest is stopped keeps them back, so that nobody's
    work makes a pause longer. A pause of more than :data:`LONGEST` seconds is told of while it lasts.

    What the other listener raises is logged, and ends no hop.
    """

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._kept: list[Event] = []
        self._stopped: set[str] = set()
        self._timer: asyncio.TimerHandle | None = None

    def __call__(self, event: Event) -> None:
        self._kept.append(event)
        if isinstance(event, GuestStopped):
            self._stopped.add(event.guest)
        elif isinstance(event, (GuestRuns, Ended)):
            self._stopped.discard(event.guest)
        if not self._stopped:
            self.flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LONGEST, self.flush)

    def flush(self) -> None:
        """Pass on what was kept back."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        kept, self._kept = self._kept, []
        for event in kept:
            try:
                self._listener(event)
            except Exception:
                log.exception("a listener has failed")
