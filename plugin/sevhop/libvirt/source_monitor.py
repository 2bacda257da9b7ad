"""
The monitor of a domain whose guest hops by the bare engine: libvirt's, together with the events that it passes on, and
bound to one QEMU. When that has exited or is halted, commands would reach the next QEMU of the domain, or never return.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

from sevhop_qmp.errors import MonitorClosed, SevhopError
from sevhop_qmp.monitor import COMMAND_TIMEOUT, Events
from sevhop_qmp.process import QemuProcess

from .daemon import Daemon
from .domain import Domain
from .domain_monitor import DomainMonitor
from .qemu_events import EventQueue, QemuEvents

#: Commands that may be repeated if it is not known whether QEMU has executed them.
_REPEATABLE = ("query-status", "stop", "cont", "query-migrate", "query-named-block-nodes")


class DomainSourceMonitor(DomainMonitor):
    """
    libvirt's monitor of a source, see :class:`sevhop_qmp.monitor.SourceMonitor`. Use :meth:`opened`.

    :ivar in_order: commands come by way of threads of libvirt's, which overtake each other.
    """

    in_order = False

    def __init__(self, domain: Domain, process: QemuProcess, events: QemuEvents, timeout: float) -> None:
        super().__init__(lambda: domain.raw, domain.name, lambda: timeout)
        self._timeout = timeout
        self._domain = domain
        self._process = process
        self._events = events
        self._closed = False
        self._misses_events = False

    @classmethod
    @contextlib.asynccontextmanager
    async def opened(
        cls, connection: Daemon, domain: Domain, process: QemuProcess, timeout: float = COMMAND_TIMEOUT
    ) -> AsyncIterator[DomainSourceMonitor]:
        """
        Connect.

        :param process: the domain's QEMU.
        :param timeout: seconds for each command that has none of its own.
        :raises SevhopError: libvirt or QEMU does not answer.
        """
        async with QemuEvents.opened(connection.uri, domain.uuid) as events:
            self = cls(domain, process, events, timeout)
            await self.greet()
            yield self

    @property
    def timeout(self) -> float:
        """Seconds for each command that has none of its own."""
        return min(COMMAND_TIMEOUT, self._timeout)

    @property
    def closed(self) -> bool:
        """Whether no command can be sent any more."""
        return self._closed or not self._process.alive

    async def close(self) -> None:
        """Send no further command. libvirt stays connected."""
        self._closed = True

    @contextlib.contextmanager
    def events(self, *names: str) -> Iterator[EventQueue]:
        """Collect events of these names meanwhile."""
        with self._events.collected(*names) as queue:
            yield queue

    async def has_events(self, listener: Events) -> bool:
        """See :meth:`sevhop_qmp.monitor.Monitor.has_events`; of all that QEMU has sent before its last answer to us."""
        try:
            await self._events.delivered(self.timeout)
        except SevhopError:
            self._misses_events = True
        return not listener.empty()

    @property
    def misses_events(self) -> bool:
        """See :class:`sevhop_qmp.monitor.SourceMonitor`: a daemon that is restarted delivers none any more."""
        return self._misses_events

    @contextlib.contextmanager
    def on_first_data(self, act: Callable[[], None]) -> Iterator[None]:
        """See :meth:`sevhop_qmp.monitor.Monitor.on_first_data`: what QEMU sends comes to libvirt, so it is the end."""
        yield
        act()

    async def _execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None,
        fds: tuple[int, ...],
        timeout: float | None = None,
    ) -> Any:
        if self.closed:
            raise MonitorClosed(f"the QEMU of {self.name} does not answer {command} any more")
        try:
            return await super()._execute(command, arguments, fds, timeout)
        except MonitorClosed:
            # The guest must not stay paused because the daemon was restarted.
            if command not in _REPEATABLE or not await self._daemon_restarted():
                raise
            return await super()._execute(command, arguments, fds, timeout)

    async def _daemon_restarted(self) -> bool:
        """Whether there is another daemon now, to which we are connected."""
        with contextlib.suppress(SevhopError):
            return await self._domain.reconnect(self.timeout)
        return False
