"""
Events that report hops in progress.

========================  ==========================================================================================
:class:`DomainsSelected`  these domains are going to be upgraded, in this order
:class:`PhaseBegan`       a phase begins; they are listed in :mod:`sevhop.engine.hop` and :mod:`sevhop.engine.upgrade`
:class:`PhaseEnded`       a phase is over, also by failure
:class:`GuestStopped`     the guest is about to be stopped, for the rehearsal or for the hop
:class:`GuestResumed`     the guest runs again, in either QEMU
:class:`MoveAttempted`    the kernel was asked to move the SEV context
:class:`HopFinished`      the hop is over, with its report
========================  ==========================================================================================

The engines report at once, also during the downtime. Listeners of callers are behind a :class:`DeferringListener`, so
that they cannot prolong it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from .report import Report

log = logging.getLogger(__name__)

#: Seconds for which events are deferred at most.
MAX_DEFERRAL = 1.0


@dataclass(frozen=True, kw_only=True)
class Event:
    """
    Something happened.

    :ivar at: when, by :func:`time.monotonic`.
    """

    at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class DomainsSelected(Event):
    """
    Domains are going to be upgraded, in this order; it is the first event of a fleet.

    :ivar excluded: domains that a rule would have selected.
    """

    domains: tuple[str, ...]
    excluded: tuple[str, ...] = ()


@dataclass(frozen=True)
class WindowClosed(Event):
    """
    No further upgrade of a fleet begins, since it is outside the maintenance window.

    :ivar window: such as ``01:00-05:00``.
    :ivar domains: that are not upgraded.
    """

    window: str
    domains: tuple[str, ...]


@dataclass(frozen=True)
class GuestEvent(Event):
    """
    Something happened to one guest.

    :ivar guest: as the caller named it: a domain, or the path of a QMP socket.
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
class GuestResumed(GuestEvent):
    """The guest runs again, after so many milliseconds."""

    ms: float


@dataclass(frozen=True)
class MoveAttempted(GuestEvent):
    """
    The kernel was asked to move the SEV context. Of a domain only the last attempt is reported: its keeper makes them.

    :ivar attempt: counts from 1.
    :ivar errno: the kernel's; 0 when the context was moved.
    """

    attempt: int
    errno: int


@dataclass(frozen=True)
class HopFinished(GuestEvent):
    """A hop is over, with any outcome; it is the last event of its guest."""

    report: Report


Listener = Callable[[Event], None]


def ignore(_: Event) -> None:
    """A listener that ignores all events."""


class DeferringListener:
    """
    A listener that passes events on in their order, but defers them while a guest is stopped, so that no listener
    prolongs its downtime. After :data:`MAX_DEFERRAL` seconds they are passed on nevertheless.

    What the other listener raises is logged, and fails no hop.
    """

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._deferred: list[Event] = []
        self._stopped: set[str] = set()
        self._timer: asyncio.TimerHandle | None = None

    def __call__(self, event: Event) -> None:
        self._deferred.append(event)
        if isinstance(event, GuestStopped):
            self._stopped.add(event.guest)
        elif isinstance(event, (GuestResumed, HopFinished)):
            self._stopped.discard(event.guest)
        if not self._stopped:
            self.flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(MAX_DEFERRAL, self.flush)

    def flush(self) -> None:
        """Pass on what was deferred."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deferred, self._deferred = self._deferred, []
        for event in deferred:
            try:
                self._listener(event)
            except Exception:
                log.exception("a listener has failed")
