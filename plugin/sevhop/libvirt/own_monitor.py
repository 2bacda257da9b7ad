"""
A monitor of our own in a QEMU of libvirt's.

Commands by way of libvirt's monitor take longer, and the daemon may be restarted meanwhile. A QEMU that a guest has
hopped into has a monitor for the keeper, which has ended, and whose socket is gone. By way of libvirt's monitor it gets
another client (``add_client``, qapi/misc.json): one end of a socket pair, of which we have the other. A QEMU that the
guest was started in has no such monitor, and none can be added.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator

from sevhop_qmp import selinux
from sevhop_qmp.errors import SevhopError
from sevhop_qmp.monitor import Monitor

from ..guest.command_line import PRIVATE_MONITOR
from .domain_monitor import DomainMonitor

_FD_NAME = "sevhop-own-monitor"
#: Seconds until QEMU must have greeted: it does so at once, unless a security module keeps it from using the socket.
_GREETING = 5.0


@contextlib.asynccontextmanager
async def opened(domain: DomainMonitor, timeout: float) -> AsyncIterator[Monitor | None]:
    """
    Connect to the monitor that nobody uses; None if there is none. Afterwards it is disconnected, for the next one.

    :param domain: libvirt's monitor of the QEMU.
    :param timeout: seconds for each command to it that has none of its own.
    :raises SevhopError: libvirt or QEMU does not answer.
    """
    monitor = await _connect(domain, timeout) if await _is_free(domain) else None
    try:
        yield monitor
    finally:
        if monitor is not None:
            await monitor.close()


async def _is_free(domain: DomainMonitor) -> bool:
    for device in await domain.execute("query-chardev"):
        if device["label"] == PRIVATE_MONITOR:
            return str(device["filename"]).startswith("disconnected:")
    return False


async def _connect(domain: DomainMonitor, timeout: float) -> Monitor | None:
    with selinux.sharing_sockets():
        ours, theirs = socket.socketpair()
    try:
        with theirs:
            await domain.send_fd(_FD_NAME, theirs.fileno())
            await domain.execute("add_client", {"protocol": PRIVATE_MONITOR, "fdname": _FD_NAME})
        return await Monitor.connect(ours, timeout=timeout, greeting_timeout=_GREETING)
    except SevhopError:
        # Commands go by way of libvirt then. If it does not answer at all, that is noticed there.
        ours.close()
        return None
    except BaseException:
        ours.close()
        raise
