"""
Starts a domain whose reboot was a shutdown. A program of its own, ``cold_start UUID URI``: libvirt's hook starts it
when the domain's QEMU has exited because of a reboot (:mod:`sevhop.records.reboot_mark`). It writes to the system log.

libvirt starts no domain twice, so nothing is done to one that somebody else has started, and nothing to one that was
destroyed meanwhile. If a hop of the domain is in progress, that is waited for: its command finds that the guest is
gone, or the keeper has the guest, and restores it.
"""

from __future__ import annotations

import asyncio
import sys
import syslog
import time

from sevhop_qmp.errors import SevhopError

from ..libvirt.connection import Connection
from ..libvirt.domain import Domain
from ..records import run_directory
from ..report import printable

#: Seconds within which a hop must be over; longer than any that is not suspended on purpose (``upgrade --prepare``).
_HOP_TIMEOUT = 600.0
_POLL = 0.2


async def start(uuid: str, uri: str) -> str:
    """
    Start a domain, if it is off and was not switched off on purpose.

    :param uri: of the daemon.
    :return: what was done, in a sentence.
    :raises SevhopError: it cannot be started.
    """
    await _until_hop_is_over(uuid)
    connection = await Connection.open(uri)
    try:
        domain = await connection.domain_with(uuid)
        if domain is None:
            return f"a transient domain ({uuid}) has rebooted and is gone: start it"
        if not await domain.stopped_by_itself():
            return f"domain {domain.name} has rebooted, and another client has changed its state: it is not started"
        return await _start(domain)
    finally:
        connection.close()


async def _until_hop_is_over(uuid: str) -> None:
    deadline = time.monotonic() + _HOP_TIMEOUT
    while await asyncio.to_thread(run_directory.in_hop, uuid):
        if time.monotonic() > deadline:
            raise SevhopError(f"its hop is still in progress after {_HOP_TIMEOUT:g} s", "see sevhop status")
        await asyncio.sleep(_POLL)


async def _start(domain: Domain) -> str:
    try:
        await domain.start()
    except SevhopError as err:
        # Another client may have started it since, or libvirt yet starts it.
        if await domain.active():
            return f"domain {domain.name} has rebooted, which was a shutdown after its hop: it is active again"
        raise SevhopError(f"{err.message}; the domain is off", f"run: virsh start {domain.name}") from err
    return f"domain {domain.name} has rebooted, which was a shutdown after its hop: it is started"


def main(arguments: list[str]) -> int:
    """The program. Nobody reads its output, so whatever happens is in the system log."""
    syslog.openlog("sevhop")
    if len(arguments) != 2:
        print("usage: python3 -m sevhop.cli.cold_start UUID URI", file=sys.stderr)
        return 2
    uuid, uri = arguments
    try:
        syslog.syslog(syslog.LOG_NOTICE, printable(asyncio.run(start(uuid, uri))))
    except SevhopError as err:
        hint = err.hint or "see virsh list --all"
        text = f"cannot start domain {uuid} after its reboot: {err.message}; {hint}"
        syslog.syslog(syslog.LOG_ERR, printable(text))
        return 1
    except Exception as err:
        text = f"cannot start domain {uuid} after its reboot: unexpected {type(err).__name__}: {err}"
        syslog.syslog(syslog.LOG_ERR, printable(f"{text}; this is a bug in sevhop: report it; run: virsh start {uuid}"))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
