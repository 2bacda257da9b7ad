"""
The first half of an upgrade by way of a transit, as a program: ``hop NAME EMULATOR [FAULT]`` has a domain hop
into a transit, and exits; ``retire NAME PID`` retires the source. Both print JSON.

A fault is ``PHASE source`` or ``PHASE destination``: that QEMU is killed when the phase begins. ``PHASE COMMAND`` is
what another client does then: ``virsh COMMAND NAME``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import subprocess
import sys
from typing import Any

from sevhop.checks.domain import examine
from sevhop.engine.retire import retire
from sevhop.engine.transit_hop import TransitHop, TransitSource
from sevhop.events import Event, PhaseBegan
from sevhop.libvirt.connection import Connection
from sevhop.options import HopOptions
from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import QemuProcess


async def hop(name: str, emulator: str, fault: str = "") -> dict[str, Any]:
    """Hop. What is reported, and the error if there was one."""
    connection = await Connection.open()
    domain = await connection.domain(name)
    async with examine(connection, domain, emulator) as examined:
        subject = TransitSource(
            connection, domain, examined.process, examined.disks, examined.xml, emulator, examined.flag
        )

        def heard(event: Event) -> None:
            phase, _, what = fault.partition(" ")
            if not isinstance(event, PhaseBegan) or event.phase != phase:
                return
            pids = {"source": one.report.source_pid, "destination": one.report.destination_pid}
            if what in pids:
                os.kill(pids[what], signal.SIGKILL)
            else:
                subprocess.run(["virsh", what, name], check=True, capture_output=True)

        one = TransitHop(subject, HopOptions(), heard)
        result: dict[str, Any] = {}
        try:
            await one.run()
        except SevhopError as err:
            result = {"error": err.message, "cause": type(err.__cause__).__name__}
        if one.transit is not None:
            result |= {"directory": str(one.transit.directory), "cgroups": one.transit.cgroups}
            await one.transit.leave()
        return dataclasses.asdict(one.report) | result


async def retired(name: str, pid: str) -> dict[str, Any]:
    """Retire the source."""
    connection = await Connection.open()
    source = QemuProcess.open(int(pid))
    await retire(await connection.domain(name), source, 10.0)
    return {"alive": source.alive}


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    print(json.dumps(asyncio.run(hop(*arguments) if command == "hop" else retired(*arguments)), default=str))
