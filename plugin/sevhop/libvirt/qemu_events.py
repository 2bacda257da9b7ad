"""
The QMP events of a domain, as libvirt passes them on (``virConnectDomainQemuMonitorEventRegister``).

libvirt delivers events by an event loop of its own, which runs in a thread as long as this process does. A connection
that is to deliver any must be opened after that loop was registered, so events have a connection of their own.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import libvirt
import libvirt_qemu

from .daemon import CALL_TIMEOUT, Daemon

_registered = threading.Lock()
_loop: threading.Thread | None = None


def _run_event_loop() -> None:
    """Register libvirt's event loop, and run it in a thread; once."""
    global _loop
    with _registered:
        if _loop is not None:
            return
        libvirt.virEventRegisterDefaultImpl()
        _loop = threading.Thread(target=_work, name="libvirt events", daemon=True)
        _loop.start()


def _work() -> None:
    while True:
        with contextlib.suppress(libvirt.libvirtError):
            libvirt.virEventRunDefaultImpl()


class EventQueue:
    """Events of some names, in their order; see :class:`sevhop_qmp.monitor.Events`."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._events: collections.deque[dict[str, Any]] = collections.deque()

    def add(self, event: dict[str, Any]) -> None:
        """One has come."""
        if event["event"] in self._names:
            self._events.append(event)

    def empty(self) -> bool:
        """Whether there are none."""
        return not self._events

    def clear(self) -> list[Any]:
        """Those that were not taken yet, in their order."""
        taken = []
        while self._events:
            taken.append(self._events.popleft())
        return taken


class QemuEvents:
    """The events of one domain. Use :meth:`opened`."""

    def __init__(self, connection: Daemon) -> None:
        self._connection = connection
        self._queues: list[EventQueue] = []

    @classmethod
    @contextlib.asynccontextmanager
    async def opened(cls, uri: str, uuid: str) -> AsyncIterator[QemuEvents]:
        """
        Receive the events of a domain meanwhile.

        :raises DomainError: there is no such domain, or libvirt does not answer.
        """
        _run_event_loop()
        connection = await Daemon.open(uri, CALL_TIMEOUT)
        try:
            self = cls(connection)
            raw = await connection.call(connection.raw.lookupByUUIDString, uuid)
            number = await connection.call(
                libvirt_qemu.qemuMonitorEventRegister, connection.raw, raw, None, self._received, None, 0
            )
            try:
                yield self
            finally:
                with contextlib.suppress(Exception):  # it is closed below
                    await connection.call(libvirt_qemu.qemuMonitorEventDeregister, connection.raw, number, timeout=1.0)
        finally:
            connection.close()

    def _received(self, _: Any, __: Any, name: str, seconds: int, micros: int, details: str | None, ___: Any) -> None:
        """In the thread of libvirt's event loop."""
        event = {"event": name, "data": _parsed(details), "timestamp": {"seconds": seconds, "microseconds": micros}}
        for queue in list(self._queues):
            queue.add(event)

    @contextlib.contextmanager
    def collected(self, *names: str) -> Iterator[EventQueue]:
        """Collect events of these names meanwhile."""
        queue = EventQueue(frozenset(names))
        self._queues.append(queue)
        try:
            yield queue
        finally:
            self._queues.remove(queue)

    async def delivered(self, timeout: float) -> None:
        """
        Wait until all events that libvirt has read from QEMU are here: those that were sent before an answer that is
        here are among them. libvirt reads requests and delivers events in one thread, in turns: an event that was
        there before the first of two requests is delivered before the second is read. Our own event loop handles what
        it has received before a timer that was set later.

        :param timeout: seconds for each step.
        :raises DomainError: libvirt does not answer.
        """
        for _ in range(2):
            await self._connection.call(self._connection.raw.getLibVersion, timeout=timeout)
        loop, handled = asyncio.get_running_loop(), asyncio.Event()

        def expired(timer: int, _: object) -> None:
            libvirt.virEventRemoveTimeout(timer)
            with contextlib.suppress(RuntimeError):  # nobody waits any more
                loop.call_soon_threadsafe(handled.set)

        libvirt.virEventAddTimeout(0, expired, None)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await handled.wait()


def _parsed(details: str | None) -> Any:
    """What QEMU sends is not trusted."""
    with contextlib.suppress(ValueError):
        return json.loads(details or "{}")
    return {}
