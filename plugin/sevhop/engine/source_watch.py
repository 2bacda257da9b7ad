"""
What happens to a source while a hop is prepared: its QMP events, from the check to the commit.

What was checked may be different a moment later. A hop checks again right before it stops the guest, but some changes
leave no trace in what QEMU answers then, and some happen after that. Events report them. They also report whether
``stop`` is what stopped the guest: one that an I/O error, a panic or another client has stopped must not be resumed by
a hop, in either QEMU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

from sevhop_qmp.errors import SevhopError
from sevhop_qmp.monitor import Events, SourceMonitor

from .stopped_guest import STOPPED, resumed_by_another

#: Events after which a guest is not what it was when it was checked, and their message.
_CHANGES = {
    "BLOCK_EXPORT_DELETED": "an export of a disk was removed",
    "BLOCK_JOB_CANCELLED": "a block job was cancelled",
    "BLOCK_JOB_COMPLETED": "a block job was completed",
    "BLOCK_JOB_ERROR": "a block job failed",
    "BLOCK_JOB_PENDING": "a block job is in progress",
    "BLOCK_JOB_READY": "a block job is in progress",
    "DEVICE_DELETED": "a device was unplugged",
    "DEVICE_TRAY_MOVED": "the tray of a drive was moved",
    "JOB_STATUS_CHANGE": "a job was begun or ended",
    "MEMORY_DEVICE_SIZE_CHANGE": "memory was plugged or unplugged",
}
#: Events of a guest that something other than ``stop`` has stopped, or is about to.
_ENDS = {
    "BLOCK_IO_ERROR": "an I/O error has stopped the guest",
    "GUEST_PANICKED": "the guest has panicked",
    "SHUTDOWN": "the guest has shut down",
    "SUSPEND": "the guest is suspended",
    "SUSPEND_DISK": "the guest is suspended",
    "WATCHDOG": "the guest's watchdog has expired",
}
_EVENTS = (*_CHANGES, *_ENDS, "RESET", "RESUME", "STOP")
#: Actions of a device on an error that do not stop the guest.
_KEEPS_RUNNING = ("ignore", "report", "none", "debug", "inject-nmi", "reset")


class SourceWatch:
    """The events of one source. Use :meth:`begin`."""

    def __init__(self, monitor: SourceMonitor, listener: Events) -> None:
        self._monitor = monitor
        self._listener = listener
        self._stopping = False
        self._before: list[str] = []
        self._since: list[str] = []

    @classmethod
    @contextmanager
    def begin(cls, monitor: SourceMonitor) -> Iterator[Self]:
        """Collect events from now on."""
        with monitor.events(*_EVENTS) as listener:
            yield cls(monitor, listener)

    def stopping(self) -> None:
        """``stop`` is about to be sent. Later events may be its consequence."""
        self._drain()
        self._stopping = True

    async def verify_undisturbed(self) -> None:
        """
        Before the guest is stopped.

        :raises SevhopError: something has changed since the watch began.
        """
        await self._collect_all()
        for name in self._before:
            if reason := self._disturbance(name):
                raise SevhopError(reason, "try again")

    async def verify_stopped(self, *, was_running: bool) -> None:
        """
        When the guest has stopped.

        :param was_running: whether the hop has stopped it; otherwise it was paused all the time.
        :raises SevhopError: it runs, or something else has happened to it.
        """
        await self._collect_all()
        events = self._since if was_running else self._before + self._since
        if "RESUME" in events:
            raise resumed_by_another()
        for name in events:
            if name == "RESET":
                raise SevhopError("the guest was reset by another client", "try again")
            if name != "STOP" and (reason := self._disturbance(name)):
                raise SevhopError(reason, "try again")
        if was_running and "STOP" not in events:
            raise SevhopError("the guest was stopped by another client", "try again")

    async def stopped_by_us(self) -> bool:
        """
        Whether our ``stop`` has stopped the guest, and nothing has happened after which it must not be resumed. If
        events were lost, the run state must do: what else stops a guest leaves it in another one.
        """
        await self._collect()
        if any(name in _ENDS for name in self._before + self._since):
            return False
        if "STOP" in self._since:
            return True
        return self._monitor.misses_events and (await self._monitor.execute("query-status"))["status"] in STOPPED

    async def _collect_all(self) -> None:
        """:raises SevhopError: some were lost."""
        await self._collect()
        if self._monitor.misses_events:
            raise SevhopError(
                "libvirt was restarted, and it is unknown what happened to the guest meanwhile", "try again"
            )

    async def _collect(self) -> None:
        await self._monitor.has_events(self._listener)
        self._drain()

    def _drain(self) -> None:
        events = self._since if self._stopping else self._before
        for event in self._listener.clear():
            name = str(event["event"])
            if not _harmless(name, event.get("data") or {}):
                events.append(name)

    def _disturbance(self, name: str) -> str:
        if name == "STOP":
            return "the guest was stopped by another client"
        if name == "RESUME":
            return "the guest was resumed by another client"
        return _CHANGES.get(name) or _ENDS.get(name) or ""


def _harmless(name: str, data: Any) -> bool:
    """Whether an event is one of an error or a watchdog that does not stop the guest."""
    return name in ("BLOCK_IO_ERROR", "WATCHDOG") and isinstance(data, Mapping) and data.get("action") in _KEEPS_RUNNING
