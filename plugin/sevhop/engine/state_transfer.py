"""The device state on its way from source to destination, and how far it has come."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from sevhop_qmp.device_state import IncomingState, OutgoingState
from sevhop_qmp.errors import SevhopError


class StateTransfer:
    """
    Both sides of the transfer: the source saves, the destination loads.

    :param timeout: seconds for each step.
    :ivar forwarded: the destination was given all but the last byte; with that one it has all of the guest.
    :ivar loaded: the destination has loaded it all; the source is not needed any more.
    """

    def __init__(self, outgoing: OutgoingState, incoming: IncomingState, timeout: float) -> None:
        self._outgoing = outgoing
        self._incoming = incoming
        self._timeout = timeout
        self._ended = False
        self._loading: asyncio.Future[Any] | None = None
        self.forwarded = False
        self.loaded = False

    @property
    def image(self) -> bytes:
        """All that was given to the destination, for another one that must load it again."""
        return bytes(self._incoming.image)

    def begin(self) -> None:
        """Order the source to save its state, after the order to stop."""
        self._outgoing.begin(timeout=self._timeout)

    def send_first_byte(self) -> None:
        """Have the destination map the guest's memory, while the source saves."""
        self._outgoing.send_first_byte()

    async def forward(self) -> None:
        """:raises StateError, MonitorError: see :meth:`sevhop_qmp.device_state.OutgoingState.forward`."""
        await self._outgoing.forward(timeout=self._timeout)
        self.forwarded = True

    async def end(self) -> None:
        """Feed the last byte: from here on the destination may have all of the guest."""
        self._ended = True
        await self._outgoing.end(timeout=self._timeout)
        self._loading = asyncio.ensure_future(self._incoming.loaded(timeout=self._timeout))
        self._loading.add_done_callback(lambda task: task.cancelled() or task.exception())  # may not be waited for

    async def until_loaded(self, runs: asyncio.Event) -> None:
        """
        Wait until the destination has loaded everything, or already runs the guest.

        :raises StateError, MonitorError: it cannot.
        """
        assert self._loading is not None
        running: asyncio.Future[Any] = asyncio.ensure_future(runs.wait())
        try:
            await asyncio.wait({self._loading, running}, return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                self._loading.result()
        finally:
            running.cancel()
        self.loaded = True

    async def until_reported(self) -> None:
        """Wait until the destination has reported, too, that it has loaded everything."""
        assert self._loading is not None
        await self._loading

    async def arrival(self, patience: float) -> None:
        """
        The source has exited: only the stream to the destination has the guest. Wait until it is loaded.

        :param patience: seconds for that.
        """
        with contextlib.suppress(SevhopError):
            if not self._ended:
                await self.end()
            if self._loading is not None:
                await asyncio.wait({self._loading}, timeout=patience)

    async def abandon(self) -> bool:
        """Nobody wants the state any more. :return: whether the source was ordered to save it."""
        return await self._outgoing.abandon()

    def close(self) -> None:
        """Wait for nothing any more."""
        if self._loading is not None:
            self._loading.cancel()
