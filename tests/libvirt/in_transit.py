"""
A domain whose guest runs in a transit, made by simple means; run inside a daemon's mount namespace, and only there. ::

    in_transit.py enter NAME EMULATOR STEP-TIMEOUT     the guest hops into a transit, and its old QEMU ends
    in_transit.py finish                               libvirt restores the domain, and the guest hops into that

What the second needs is in :data:`STATE`. Both print an object in JSON. The domain needs a QMP socket of its own
(:func:`monitor_of`), a disk and a card with a tap.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from sevhop.engine.destination import Destination, LaunchContext
from sevhop.engine.second_hop import Meeting, RestoredDestination, SecondHop, Stream
from sevhop.engine.transit_restore import InTransit, restore_from_transit, take_into_keeper
from sevhop.engine.upgrade_restore import define_emulator
from sevhop.errors import HopError
from sevhop.guest import command_line, inspection, runtime_settings, saved_settings
from sevhop.keeper.client import KeeperClient
from sevhop.keeper.handover import SourceHandles
from sevhop.keeper.local import LocalKeeper
from sevhop.libvirt import domain_xml
from sevhop.libvirt.connection import Connection
from sevhop.options import HopOptions
from sevhop.records.hop_record import HopRecord, Process
from sevhop.records.journal import Journal, journals
from sevhop_qmp import adopt
from sevhop_qmp.device_state import IncomingState
from sevhop_qmp.monitor import Monitor
from sevhop_qmp.process import QemuProcess
from sevhop_qmp.run_mark import RunMark

STATE = Path("/run/transit.json")
_GUESTS = Path("/var/lib/libvirt/guests")
_OMITTED = frozenset("add-fd daemonize display gdb incoming mon monitor msg pidfile qmp S spice vnc".split())
_OWN = "own-monitor"


def monitor_of(name: str) -> Path:
    """Where the QMP socket of a domain is that the first hop uses."""
    return _GUESTS / f"{name}.qmp"


def elements(name: str) -> str:
    """What the domain needs for it, in XML."""
    chardev = f"socket,id={_OWN},path={monitor_of(name)},server=on,wait=off"
    words = ["-chardev", chardev, "-mon", f"chardev={_OWN},mode=control"]
    added = "".join(f"<q:arg value='{word}'/>" for word in words)
    return f"<q:commandline xmlns:q='{domain_xml.NAMESPACE}'>{added}</q:commandline>"


def _arguments(destination: list[str], source: QemuProcess) -> tuple[list[str], list[int]]:
    """The domain's own devices, with its disks and the source's taps."""
    own = command_line.parse(source.command_line[1:])
    options = [option for option in command_line.parse(destination) if option.name not in _OMITTED]
    known = {command_line.properties(option.value or "").get("id") for option in options if option.name == "device"}
    netdevs = {
        command_line.properties(option.value or "").get("id"): option for option in own if option.name == "netdev"
    }
    cards = []
    for option in own:
        props = command_line.properties(option.value or "")
        if option.name == "device" and "netdev" in props and props.get("id") not in known:
            cards += [netdevs[props["netdev"]], option]
    nodes = [json.loads(option.value or "{}") for option in options if option.name == "blockdev"]
    above = {node["file"]: node for node in nodes if isinstance(node.get("file"), str)}
    arguments: list[str] = []
    keep: list[int] = []
    for option in [*options, *cards]:
        props = command_line.properties(option.value or "")
        if option.name == "blockdev":
            node = json.loads(option.value or "{}")
            if node.pop("auto-read-only", False):
                node["read-only"] = above.get(node["node-name"], {}).get("read-only", False)
            arguments += ["-blockdev", json.dumps(node)]
        elif option.name == "chardev" and props.get("") == "file":
            arguments += option.argv()
        elif option.name == "chardev":
            arguments += ["-chardev", f"file,id={props.get('id', '')},path=/dev/null"]
        elif option.name == "netdev" and props.get("", props.get("type", "")) == "tap":
            numbers = (props.get("fds") or props.get("fd") or "").split(":")
            fds = [source.duplicate(int(number)) for number in numbers]
            keep += fds
            key = "fd" if len(fds) == 1 else "fds"
            arguments += ["-netdev", f"tap,id={props['id']},{key}={':'.join(map(str, fds))},vhost=off"]
        elif option.name == "object" and props.get("", props.get("qom-type")) == "secret":
            continue
        else:
            arguments += option.argv()
    return [*arguments, "-display", "none"], keep


def _within(source: QemuProcess) -> list[str]:
    identity = source.credentials
    groups = f"--groups={','.join(map(str, identity.groups))}" if identity.groups else "--clear-groups"
    user = [f"--reuid={identity.uid}", f"--regid={identity.gid}", groups]
    return ["nsenter", f"--mount=/proc/{source.pid}/ns/mnt", "--", "setpriv", *user, "--"]


class FirstHop(SecondHop):
    """From the domain's QEMU into the transit."""

    async def _arm(self, incoming: IncomingState, header: bytes) -> None:
        await incoming.arm(header)

    async def _meet(self, *_: object) -> None:
        pass

    async def _finish(self, checked: Any, prepared: Any) -> None:
        await prepared.transfer.until_reported()
        await adopt.finish(self._met.destination.monitor)


async def enter(name: str, emulator: str, timeout: float) -> dict[str, object]:
    """The guest hops into a transit, a keeper has that, and the old QEMU ends."""
    async with contextlib.AsyncExitStack() as resources:
        connection = await Connection.open()
        resources.callback(connection.close)
        domain = await connection.domain(name)
        source = QemuProcess.open(domain.pid())
        monitor = await resources.enter_async_context(await Monitor.connect(monitor_of(name)))
        guest = await inspection.inspect(monitor, source)
        xml = domain_xml.without_additions(await domain.xml())
        bare = domain_xml.with_emulator(domain_xml.without_interfaces(xml), emulator)
        environment, (program, *arguments) = await connection.command_line(bare)
        derived, keep = _arguments(arguments, source)
        handles = SourceHandles.take_machine(source, guest.blocks.values())
        run_mark = RunMark.create()
        keeper = resources.enter_context(LocalKeeper(handles, guest.context, run_mark, source))
        ourselves = QemuProcess.open(os.getpid())
        out, err = (os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC) for _ in range(2))
        context = LaunchContext(ourselves.credentials, "/", dict(environment), source.limits, out, err)
        transit = await Destination.start(
            program,
            derived,
            context,
            keeper,
            within=_within(source),
            keep=keep,
            paused=guest.state != "running",
        )
        identity = source.credentials
        meeting = Meeting(
            monitor=monitor,
            transit=source,
            destination=RestoredDestination(QemuProcess.open(transit.process.pid), transit.directory, transit.monitor),
            uid=identity.uid,
            gid=identity.gid,
            notice=keeper,
            run_mark=run_mark,
            stream=Stream(-1, -1),
            header_given=lambda: None,
            announced=lambda: None,
            accepted=lambda: asyncio.sleep(0),
            stopping=lambda running: None,
        )
        settings = await runtime_settings.read(monitor, source)
        old = domain_xml.describe(xml).emulator
        record = HopRecord(
            kind="domain",
            guest=name,
            uri=connection.uri,
            uuid=domain.uuid,
            context="none",
            running=guest.state == "running",
            source=Process.of(source),
            old=old,
            new=emulator,
        )
        journal = Journal.begin(record)
        resources.callback(journal.leave)
        report = await FirstHop(name, meeting, HopOptions()).run()
        await transit.leave()
        monitor_path, place = str(transit.directory / "monitor"), str(transit.directory)
        there_now = Process.of(meeting.destination.process)
        journal.write({"transit": there_now, "transit_monitor": monitor_path, "transit_directory": place})
        journal.write({"phase": "second hop", "committed": True})
        path = transit.directory / "monitor"
        process = QemuProcess.open(meeting.destination.process.pid)
        there = InTransit(
            connection.uri, name, domain.uuid, xml, old, emulator, process, path, transit.directory, (), timeout
        )
        held = await take_into_keeper(there)
        saved_settings.save(held.directory, settings, None)
        source.kill()
        await source.wait(10)
        await source.wait_reaped(10)
        await domain.destroy()
        fields = {
            "uri": there.uri,
            "name": name,
            "uuid": there.uuid,
            "xml": xml,
            "old": old,
            "new": emulator,
            "pid": process.pid,
            "monitor": str(path),
            "directory": str(transit.directory),
            "keeper": str(held.directory),
            "timeout": timeout,
        }
        STATE.write_text(json.dumps(fields))
        held.close()
        return {"image": str(held.image), "transit": process.pid, "downtime_ms": report.downtime_ms}


async def finish() -> dict[str, object]:
    """libvirt restores the domain, and the persistent definition follows."""
    fields = json.loads(STATE.read_text())
    process = QemuProcess.open(fields["pid"])
    there = InTransit(
        fields["uri"],
        fields["name"],
        fields["uuid"],
        fields["xml"],
        fields["old"],
        fields["new"],
        process,
        Path(fields["monitor"]),
        Path(fields["directory"]),
        (),
        fields["timeout"],
    )
    connection = await Connection.open(there.uri)
    keeper = await KeeperClient.connect(Path(fields["keeper"]))
    try:
        began = time.monotonic()
        try:
            restored = await restore_from_transit(connection, there, keeper)
        except HopError as err:
            state = (await keeper.status())["state"]
            return {"error": type(err).__name__, "message": str(err), "guest": err.guest_state.value, "state": state}
        took = time.monotonic() - began
        await define_emulator(connection, there.uuid, there.old, restored.emulator)
        await keeper.release()
        for path in journals():
            Journal.take_over(path).end()
        return {"emulator": restored.emulator, "failure": restored.failure, "s": took, **restored.status}
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
