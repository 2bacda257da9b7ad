"""
The clock of a guest that was stopped for long. QEMU's clocks stop with the guest, but for the real-time clock: a guest
that has read the time before, from which it counts, is behind by the time that it was stopped. Where a guest agent is
connected, libvirt has it set the clock (guest-set-time); otherwise somebody has to know.
"""

from __future__ import annotations

import asyncio
import time

from sevhop_qmp.errors import SevhopError

from ..libvirt.connection import Connection
from ..report import LONG_STOP_MS, Clock

#: Seconds until libvirt must have seen the agent in a QEMU that has just got the guest.
_CONNECTS = 3.0
#: Seconds for the agent, which may hang, or have been stopped itself.
_ANSWERS = 5.0
_POLL = 0.05


async def settle(connection: Connection, uuid: str, stopped_ms: float | None, *, set_time: bool) -> Clock | None:
    """
    Have the clock of a domain's guest set, if it was stopped for long. A failure matters to nobody but the guest.

    :param stopped_ms: milliseconds in all; None if it was not stopped.
    :param set_time: whether the clock may be set.
    :return: what has become of it; None if the guest was not stopped for long, or libvirt does not have it running.
    """
    if stopped_ms is None or stopped_ms <= LONG_STOP_MS:
        return None
    try:
        await connection.reconnect()
        domain = await connection.domain_with(uuid)
        if domain is None or not await domain.running():
            return None
        if not set_time:
            return Clock(False, "--no-set-time")
        deadline = time.monotonic() + _CONNECTS
        while not (connected := await domain.has_agent()):
            if connected is None:
                return Clock(False, "it has no guest agent")
            if time.monotonic() > deadline:
                return Clock(False, "its guest agent is not connected")
            await asyncio.sleep(_POLL)
        await domain.synchronize_clock(_ANSWERS)
    except SevhopError as err:
        return Clock(False, err.message)
    return Clock(True)
