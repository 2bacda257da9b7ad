"""
Retires the QEMU of a domain whose guest is elsewhere: it is killed, and libvirt cleans up after it.

libvirt cannot have two domains of one UUID, so it must have seen the old QEMU exit before it starts a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterator

from sevhop_qmp import stream_sockets
from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import QemuProcess

from ..libvirt.domain import Domain

#: Name of the socket through which libvirt speaks to a QEMU.
LIBVIRT_MONITOR = "monitor.sock"
#: Seconds that libvirt takes at most unless it waits for somebody.
_PROMPT = 0.5


@contextlib.contextmanager
def libvirt_kept_connected(source: QemuProcess) -> Iterator[Callable[[], None]]:
    """
    Keep libvirt's connection to a QEMU open while that exits, for :func:`clean_up`. When a QEMU hangs up, libvirt polls
    every 200 ms until it has exited; later it polls once.

    :return: what closes the connection, which may be called again.
    """
    with contextlib.ExitStack() as connections:
        with contextlib.suppress(SevhopError):
            for fd in stream_sockets.connections(source, LIBVIRT_MONITOR):
                connections.callback(os.close, fd)
        yield connections.close


async def clean_up(domain: Domain, hang_up: Callable[[], None]) -> None:
    """
    Have libvirt clean up after a QEMU that has exited.

    Before that libvirt completes what other clients have asked it for, which may be a question to that QEMU: virsh
    domstats, or a metrics exporter. It gives up when the connection ends.

    :param hang_up: see :func:`libvirt_kept_connected`.
    :raises DomainError: it does not.
    """
    waiting = asyncio.get_running_loop().call_later(_PROMPT, hang_up)
    try:
        await domain.destroy()
    finally:
        waiting.cancel()


async def retire(domain: Domain, source: QemuProcess, timeout: float) -> None:
    """
    Kill the source of a domain whose guest has hopped elsewhere, and wait until libvirt has shut the domain off. A
    transient domain is not known any more then. May be repeated.

    :param source: halted; nothing of the guest is in there any more.
    :param timeout: seconds in which it must exit.
    :raises SevhopError: it does not exit, or libvirt does not clean up. The guest is not affected.
    """
    with libvirt_kept_connected(source) as hang_up:
        source.kill()
        if not await source.wait(timeout):
            hint = "it waits in the kernel, usually for storage: restore that, then try again"
            raise SevhopError(f"cannot kill the old QEMU (process {source.pid})", hint)
        # Not every init reaps at once; libvirt would wait for it.
        await source.wait_reaped(timeout)
        await clean_up(domain, hang_up)
