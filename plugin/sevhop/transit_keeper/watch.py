"""
The transit as the keeper sees it: its monitor, and what its guest does there, since libvirt does not know of it.

A guest that is switched off, or has panicked, in the transit leaves a domain that is shut off already, to libvirt. If
the domain's XML asks for a restart then, the keeper has libvirt start it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sevhop_qmp.errors import MonitorError, MonitorTimeout, SevhopError
from sevhop_qmp.monitor import Monitor
from sevhop_qmp.process import QemuProcess

from ..engine.transit import has_rebooted
from ..keeper.config import KeeperConfig, TransitConfig
from ..libvirt.connection import Connection

log = logging.getLogger(__name__)

#: Seconds between two attempts to connect to its monitor, and between two looks at what libvirt does.
_POLL = 0.05
#: Reasons of a shutdown that is a reboot (QAPI type ShutdownCause).
_RESETS = ("guest-reset", "host-qmp-system-reset")
_REBOOTED = "the guest has rebooted"
#: Run states of a guest that does not run any more.
_OFF = {"shutdown": "the guest has shut down", "guest-panicked": "the guest has panicked"}


@dataclass(frozen=True)
class End:
    """The end of a guest in the transit: why, and what its domain's XML asks for (``destroy``, ``restart`` ...)."""

    reason: str
    action: str

    @property
    def restarts(self) -> bool:
        """Whether the domain is to be started again."""
        return self.action.endswith("restart")

    @property
    def preserves(self) -> bool:
        """Whether its QEMU is to stay, with all that is left of the guest."""
        return self.action == "preserve"


class TransitWatch:
    """
    The monitor of a transit.

    :param pid: of its process.
    :param timeout: seconds for each of its commands.
    :ivar version: of its QEMU; empty before it was reached.
    """

    def __init__(self, config: TransitConfig, pid: int, timeout: float) -> None:
        self._config = config
        self._process = QemuProcess.open(pid)
        self._timeout = timeout
        self._monitor: Monitor | None = None
        self._connecting = asyncio.Lock()
        self.version = ""

    async def connected(self) -> Monitor:
        """
        Its monitor.

        :raises MonitorError: it does not answer, or another process does.
        """
        async with self._connecting:
            if self._monitor is None or self._monitor.closed:
                monitor = await Monitor.connect(
                    self._config.monitor, timeout=self._timeout, greeting_timeout=self._timeout
                )
                if monitor.peer != self._process.pid:
                    await monitor.close()
                    raise MonitorError(f"{self._config.monitor} is not served by the transit")
                self._monitor, self.version = monitor, monitor.version
            return self._monitor

    async def until_ended(self) -> End:
        """Wait until its guest is off, or its process has exited."""
        while self._process.alive:
            try:
                monitor = await self.connected()
                with monitor.events("SHUTDOWN", "GUEST_PANICKED") as events:
                    while (end := await self._look(monitor, events)) is None:
                        pass
                    return end
            except SevhopError as err:
                log.info("the transit does not answer: %s", err)
                await asyncio.sleep(_POLL)
        return End("the transit has exited, and the guest with it", "")

    async def _look(self, monitor: Monitor, events: Any) -> End | None:
        config, end = self._config, None
        status = str((await monitor.execute("query-status"))["status"])
        if status in _OFF and events.empty():
            end = End(_OFF[status], config.on_poweroff if status == "shutdown" else config.on_crash)
            if status == "shutdown" and has_rebooted(Path(config.directory)):
                end = End(_REBOOTED, config.on_reboot)
        if end is None or end.preserves:
            with contextlib.suppress(MonitorTimeout):
                event = await monitor.next_event(events)
                data = event.get("data") or {}
                if event["event"] == "GUEST_PANICKED":
                    end = End(_OFF["guest-panicked"], config.on_crash)
                elif isinstance(data, dict) and data.get("reason") in _RESETS:
                    end = End(_REBOOTED, config.on_reboot)
                else:
                    end = End(_OFF["shutdown"], config.on_poweroff)
        return None if end is None or end.preserves else end

    async def destroyed_by_client(self, config: KeeperConfig) -> bool:
        """Whether a client has destroyed the domain, whose new QEMU has exited."""
        deadline = time.monotonic() + config.step_timeout
        with contextlib.suppress(SevhopError):
            connection = await Connection.open(config.uri, config.step_timeout)
            try:
                while time.monotonic() < deadline:
                    domain = await connection.domain_with(config.uuid)
                    if domain is None:
                        return False  # a transient one is gone, and with it the reason
                    if not await domain.active():
                        return await domain.destroyed()
                    await asyncio.sleep(_POLL)
            finally:
                connection.close()
        return False

    async def start_domain(self, config: KeeperConfig) -> str:
        """Have libvirt start the domain. :return: a note if it does not."""
        try:
            connection = await Connection.open(config.uri, config.step_timeout)
            try:
                domain = await connection.domain_with(config.uuid)
                if domain is None:
                    return "the guest has rebooted, and its transient domain is gone: start it"
                await domain.start()
            finally:
                connection.close()
        except SevhopError as err:
            return f"the domain cannot be started again: {err.message}; run: virsh start {config.name}"
        return ""
