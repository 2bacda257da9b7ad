"""
A domain whose guest runs in a transit; run inside a daemon's mount namespace, and only there. ::

    in_transit.py enter NAME EMULATOR STEP-TIMEOUT     the guest hops into a transit, and its old QEMU ends
    in_transit.py finish                               libvirt restores the domain, and the guest hops into that

What the second needs is in :data:`STATE`. Both print an object in JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from pathlib import Path

from sevhop.checks.domain import examine
from sevhop.engine.destination import MONITOR
from sevhop.engine.retire import retire
from sevhop.engine.transit_hop import TransitHop, TransitSource
from sevhop.engine.transit_restore import InTransit, recorded, restore_from_transit, take_into_keeper
from sevhop.errors import HopError
from sevhop.keeper.client import KeeperClient
from sevhop.libvirt import domain_xml
from sevhop.libvirt.connection import Connection
from sevhop.options import HopOptions
from sevhop.records.hop_record import HopRecord, Process
from sevhop.records.journal import Journal, journals
from sevhop_qmp.process import QemuProcess

STATE = Path("/run/transit.json")


async def enter(name: str, emulator: str, timeout: float) -> dict[str, object]:
    """The guest hops into a transit, a keeper has that, and the old QEMU ends."""
    async with contextlib.AsyncExitStack() as resources:
        connection = await Connection.open()
        resources.callback(connection.close)
        domain = await connection.domain(name)
        examined = await resources.enter_async_context(examine(connection, domain, emulator))
        journal = Journal.begin(
            HopRecord(
                kind="domain",
                guest=name,
                uri=connection.uri,
                uuid=domain.uuid,
                xml=examined.xml,
                context="none",
                running=examined.guest.state == "running",
                source=Process.of(examined.process),
                old=examined.old,
                new=emulator,
            )
        )
        resources.callback(journal.leave)
        subject = TransitSource(
            connection, domain, examined.process, examined.disks, examined.xml, emulator, examined.flag
        )
        displays = domain_xml.ports(await domain.live_xml())
        hop = TransitHop(subject, HopOptions(), recorder=lambda **fields: journal.write(recorded(fields)))
        report = await hop.run()
        transit = hop.transit
        assert transit is not None
        process, directory = QemuProcess.open(transit.process.pid), transit.directory
        await transit.leave()
        there = InTransit(
            uri=connection.uri,
            name=name,
            uuid=domain.uuid,
            xml=examined.xml,
            old=examined.old,
            new=emulator,
            process=process,
            monitor=directory / MONITOR,
            directory=directory,
            cgroups=transit.cgroups,
            settings=hop.settings,
            displays=displays,
            step_timeout=timeout,
        )
        held = await take_into_keeper(there)
        await retire(domain, examined.process, timeout)
        fields = {
            "uri": there.uri,
            "name": name,
            "uuid": there.uuid,
            "xml": there.xml,
            "old": there.old,
            "new": emulator,
            "monitor": str(there.monitor),
            "directory": str(directory),
            "step_timeout": timeout,
        }
        STATE.write_text(json.dumps({"keeper": str(held.directory), "pid": process.pid, "transit": fields}))
        held.close()
        return {"image": str(held.image), "transit": process.pid, "downtime_ms": report.downtime_ms}


async def finish() -> dict[str, object]:
    """libvirt restores the domain, and the persistent definition follows."""
    state = json.loads(STATE.read_text())
    fields = state["transit"]
    paths = {name: Path(fields[name]) for name in ("monitor", "directory")}
    there = InTransit(**fields | paths, process=QemuProcess.open(state["pid"]))
    connection = await Connection.open(there.uri)
    keeper = await KeeperClient.connect(Path(state["keeper"]))
    try:
        began = time.monotonic()
        try:
            restored = await restore_from_transit(connection, there, keeper)
        except HopError as err:
            state = (await keeper.status())["state"]
            return {"error": type(err).__name__, "message": str(err), "guest": err.guest_state.value, "state": state}
        took = time.monotonic() - began
        for path in journals():
            Journal.take_over(path).end()
        return {
            "emulator": restored.emulator,
            "failure": restored.failure,
            "notes": restored.notes,
            "s": took,
            **restored.status,
        }
    finally:
        keeper.close()
        connection.close()


def main(what: str, *words: str) -> int:
    """The program."""
    if what == "enter":
        name, emulator, timeout = words
        result = asyncio.run(enter(name, emulator, float(timeout)))
    else:
        result = asyncio.run(finish())
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
