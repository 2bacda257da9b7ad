"""
Starts a domain whose reboot was a shutdown. A program of its own, ``cold_start UUID URI``: libvirt's hook starts it
when the domain's QEMU has exited because of a reboot (:mod:`sevhop.records.reboot_mark`). It writes to the system log.

libvirt starts no domain twice, so nothing is done to one that somebody else has started, and nothing to one that was
destroyed meanwhile.
"""

from __future__ import annotations

import asyncio
import sys
import syslog

from sevhop_qmp.errors import SevhopError

from ..libvirt.connection import Connection
from ..report import printable


async def start(uuid: str, uri: str) -> str:
    """
    Start a domain, if it is off and was not switched off on purpose.

    :param uri: of the daemon.
    :return: what was done, in a sentence.
    :raises SevhopError: it cannot be started.
    """
    connection = await Connection.open(uri)
    try:
        domain = await connection.domain_with(uuid)
        if domain is None:
            return f"a transient domain ({uuid}) has rebooted and is gone: start it"
        if not await domain.stopped_by_itself():
            return f"domain {domain.name} has rebooted, and another client has changed its state: it is not started"
        await domain.start()
        return f"domain {domain.name} has rebooted, which was a shutdown after its hop: it is started"
    finally:
        connection.close()


def main(arguments: list[str]) -> int:
    """The program."""
    syslog.openlog("sevhop")
    uuid, uri = arguments
    try:
        syslog.syslog(syslog.LOG_NOTICE, printable(asyncio.run(start(uuid, uri))))
    except SevhopError as err:
        text = f"cannot start domain {uuid} after its reboot: {err}; the domain is off; run: virsh start {uuid}"
        syslog.syslog(syslog.LOG_ERR, printable(text))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
