"""
The life of a guest: what is done to one while it runs, by its owner or by somebody who does not know of hops.

A guest that was just started is what its command line describes. One that has lived is not: its disk has snapshots, a
medium was changed, a disk and a card were plugged and others unplugged; it was throttled, paused, pinned. After a hop
it must be what it was before, so :class:`Facts` records that, and what is done returns what it changes in them.

:class:`Life` does it to a guest outside libvirt, :class:`.domain_life.DomainLife` to a domain.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from sevhop_qmp.errors import CommandError
from sevhop_qmp.monitor import Monitor

from .machine import Machine

#: What a guest is: ``status``, ``file DRIVE``, ``throttle DRIVE``, ``bitmap NAME``, ``device ID``, ``affinity``.
Facts: TypeAlias = dict[str, str]
#: What becomes of facts: a value, or None for one that is none any more.
Changed: TypeAlias = dict[str, str | None]

#: Seconds for something that QEMU or the guest does in the background.
_PATIENCE = 60.0
_POLL = 0.01
#: A chain of snapshots that long is merged.
LONGEST_CHAIN = 4
#: Where cards are plugged.
_SLOTS = ("slot1", "slot2")


class NotNow(Exception):
    """What was to be done cannot be done to the guest as it is."""


def lived_in(machine: Machine) -> Machine:
    """The same machine, with what its life needs: a second monitor, and devices that can be changed."""
    directory = machine.directory
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in ("one.iso", "two.iso", "spare.raw"):
        if not (directory / name).exists():
            with open(directory / name, "wb") as file:
                file.truncate(1 << 20)
    more = [*machine.more, "-qmp", f"unix:{operator_monitor(directory)},server=on,wait=off"]
    for number, slot in enumerate(_SLOTS):
        more += ["-device", f"pcie-root-port,id={slot},chassis={number + 1}"]
    more += ["-device", "virtio-scsi-pci,id=drives", "-device", "qemu-xhci,id=ports"]
    more += ["-drive", f"if=none,id=cd,media=cdrom,readonly=on,format=raw,file={directory}/one.iso"]
    more += ["-device", "scsi-cd,bus=drives.0,drive=cd,id=cd0"]
    more += ["-blockdev", f"driver=file,node-name=spare,filename={directory}/spare.raw"]
    more += ["-device", "scsi-hd,bus=drives.0,drive=spare,id=spare0"]
    more += ["-netdev", "hubport,id=second,hubid=7", "-device", "usb-net,bus=ports.0,netdev=second,id=card0"]
    return replace(machine, disk_mib=machine.disk_mib or 16, more=tuple(more))


def operator_monitor(directory: Path) -> Path:
    """The monitor of whoever lives with a guest while it hops."""
    return directory / "operator.sock"


class AnyLife:
    """
    What is done to one guest, outside libvirt or in it.

    :param choices: what is drawn, and names of new files.
    """

    #: All that can be done, in the order in which a guest that has everything behind it was given it.
    ALL = ("snapshot", "medium", "unplug_disk", "plug_disk", "unplug_card", "plug_card", "throttle", "bitmap", "pin")
    #: What can be done besides, when something else was done before.
    AFTERWARDS: tuple[str, ...] = ("commit", "remove_bitmap")

    def __init__(self, choices: random.Random) -> None:
        self._choices = choices

    def live(self) -> None:
        """Everything once, and a paused spell."""
        for what in (*self.ALL, "stop", "cont"):
            self.do(what)

    def draw(self) -> str:
        """Something to do."""
        return self._choices.choice((*self.ALL, *self.AFTERWARDS))

    def do(self, what: str) -> Changed:
        """
        Do one of :data:`ALL` or :data:`AFTERWARDS`, or ``stop``, ``cont``.

        :return: what it changes.
        :raises NotNow: it has no meaning now.
        """
        raise NotImplementedError

    def facts(self) -> Facts:
        """What the guest is now."""
        raise NotImplementedError

    def _name(self) -> str:
        return f"life-{self._choices.getrandbits(32):08x}"


def chain_of(image: Mapping[str, Any]) -> list[str]:
    """The files of an image and of those below it, as QEMU reports them (``ImageInfo``)."""
    chain = [str(image["filename"])]
    while below := image.get("backing-image"):
        image = below
        chain.append(str(image["filename"]))
    return chain


class Life(AnyLife):
    """
    What is done to one guest outside libvirt, of :func:`lived_in`.

    :param directory: of its machine.
    """

    AFTERWARDS = (*AnyLife.AFTERWARDS, "unplug_card_again")

    def __init__(self, directory: Path, choices: random.Random) -> None:
        super().__init__(choices)
        self._directory = directory

    def do(self, what: str) -> Changed:
        """
        Do one of :data:`ALL`, or ``commit``, ``remove_bitmap``, ``unplug_card_again``, ``stop``, ``cont``.

        :return: what it changes.
        :raises NotNow: it has no meaning now.
        :raises SevhopError: QEMU refuses it, or does not answer.
        """
        return asyncio.run(self.done(what))

    async def done(self, what: str, timeout: float = _PATIENCE) -> Changed:
        """The same in a coroutine. :param timeout: seconds for each command."""
        step: Callable[[Monitor], Awaitable[Changed]] = getattr(self, f"_{what}")
        path = operator_monitor(self._directory)
        async with await Monitor.connect(path, timeout=timeout, greeting_timeout=timeout) as monitor:
            return await step(monitor)

    def facts(self) -> Facts:
        """What the guest is now."""
        return asyncio.run(self._facts())

    async def _facts(self) -> Facts:
        path = operator_monitor(self._directory)
        async with await Monitor.connect(path, timeout=_PATIENCE, greeting_timeout=_PATIENCE) as monitor:
            facts = {"status": str((await monitor.execute("query-status"))["status"])}
            for row in await monitor.execute("query-block"):
                if name := _drive(row):
                    image = row.get("inserted") or {}
                    facts[f"file {name}"] = str(image.get("file", ""))
                    if image.get("iops"):
                        facts[f"throttle {name}"] = str(image["iops"])
            for node in await monitor.execute("query-named-block-nodes"):
                for bitmap in node.get("dirty-bitmaps", ()):
                    if bitmap.get("persistent"):
                        usable = not bitmap.get("inconsistent")
                        facts[f"bitmap {bitmap['name']}"] = "usable" if usable else "inconsistent"
            for entry in await monitor.execute("qom-list", {"path": "/machine/peripheral"}):
                if entry["type"].startswith("child<"):
                    facts[f"device {entry['name']}"] = entry["type"]
            facts["affinity"] = ",".join(map(str, sorted(os.sched_getaffinity((await _vcpus(monitor))[0]))))
        return facts

    # -- disks -------------------------------------------------------------------------------------

    async def _snapshot(self, monitor: Monitor) -> Changed:
        row = await _row(monitor, "disk")
        await self._remove_merged(monitor)
        if len(chain_of(row["inserted"]["image"])) > LONGEST_CHAIN:
            return await self._commit(monitor)
        path, node = str(self._directory / f"{self._name()}.qcow2"), self._name()
        arguments = {"node-name": row["inserted"]["node-name"], "snapshot-file": path, "snapshot-node-name": node}
        await monitor.execute("blockdev-snapshot-sync", arguments)
        return {"file disk": path}

    async def _commit(self, monitor: Monitor) -> Changed:
        row = await _row(monitor, "disk")
        chain = chain_of(row["inserted"]["image"])
        if len(chain) < 2:
            raise NotNow("there is no snapshot")
        if await self._has_bitmaps(monitor):
            raise NotNow("a bitmap is in the way")
        job = self._name()
        await monitor.execute("block-commit", {"job-id": job, "device": row["inserted"]["node-name"]})
        await _until(monitor, "query-block-jobs", lambda jobs: any(one["ready"] for one in jobs))
        await monitor.execute("block-job-complete", {"device": job})
        await _until(monitor, "query-block-jobs", lambda jobs: not jobs)
        return {"file disk": chain[-1]}

    async def _remove_merged(self, monitor: Monitor) -> None:
        """Overlays of which the guest has the base again: QEMU takes no snapshot while they are on top of that."""
        for node in await monitor.execute("query-named-block-nodes", {"flat": True}):
            if node["drv"] == "qcow2":
                with contextlib.suppress(CommandError):  # it is in use
                    await monitor.execute("blockdev-del", {"node-name": node["node-name"]})

    async def _medium(self, monitor: Monitor) -> Changed:
        row = await _row(monitor, "cd0")
        now = (row.get("inserted") or {}).get("file", "")
        other = "one.iso" if now.endswith("two.iso") else "two.iso"
        if now and self._choices.random() < 0.3:
            await monitor.execute("eject", {"id": "cd0", "force": True})
            return {"file cd0": ""}
        path = str(self._directory / other)
        await monitor.execute("blockdev-change-medium", {"id": "cd0", "filename": path, "format": "raw"})
        return {"file cd0": path}

    async def _unplug_disk(self, monitor: Monitor) -> Changed:
        row = next((row for row in await _rows(monitor) if _drive(row).startswith("spare")), None)
        if row is None:
            raise NotNow("none is plugged")
        drive, node = _drive(row), row["inserted"]["node-name"]
        await _unplug(monitor, drive)
        await _until(monitor, "query-block", lambda rows: drive not in [_drive(row) for row in rows])
        await monitor.execute("blockdev-del", {"node-name": node})
        return {f"file {drive}": None, f"device {drive}": None}

    async def _plug_disk(self, monitor: Monitor) -> Changed:
        if any(_drive(row).startswith("spare") for row in await _rows(monitor)):
            raise NotNow("one is plugged")
        path, node, drive = str(self._directory / "spare.raw"), self._name(), f"spare{self._name()}"
        await monitor.execute("blockdev-add", {"driver": "file", "node-name": node, "filename": path})
        await monitor.execute("device_add", {"driver": "scsi-hd", "bus": "drives.0", "drive": node, "id": drive})
        return {f"file {drive}": path, f"device {drive}": "child<scsi-hd>"}

    async def _throttle(self, monitor: Monitor) -> Changed:
        iops = self._choices.randrange(100_000, 200_000)
        limits = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops_rd", "iops_wr"), 0)
        qdev = (await _row(monitor, "disk"))["qdev"]
        await monitor.execute("block_set_io_throttle", {"id": qdev, "iops": iops, **limits})
        return {"throttle disk": str(iops)}

    async def _bitmap(self, monitor: Monitor) -> Changed:
        node, name = (await _row(monitor, "disk"))["inserted"]["node-name"], self._name()
        if await self._has_bitmaps(monitor):
            return await self._remove_bitmap(monitor)
        await monitor.execute("block-dirty-bitmap-add", {"node": node, "name": name, "persistent": True})
        return {f"bitmap {name}": "usable"}

    async def _remove_bitmap(self, monitor: Monitor) -> Changed:
        top = (await _row(monitor, "disk"))["inserted"]
        if not (bitmaps := top.get("dirty-bitmaps")):
            raise NotNow("there is none")
        name = bitmaps[0]["name"]
        await monitor.execute("block-dirty-bitmap-remove", {"node": top["node-name"], "name": name})
        return {f"bitmap {name}": None}

    async def _has_bitmaps(self, monitor: Monitor) -> bool:
        """Whether the disk has one that a hop must keep: in its topmost image, or in one below."""
        return any(node.get("dirty-bitmaps") for node in await monitor.execute("query-named-block-nodes"))

    # -- cards and processors ----------------------------------------------------------------------

    async def _unplug_card(self, monitor: Monitor) -> Changed:
        if "card0" not in await _peripherals(monitor):
            raise NotNow("it is unplugged")
        await _unplug(monitor, "card0")
        return {"device card0": None}

    async def _plug_card(self, monitor: Monitor) -> Changed:
        there = await _peripherals(monitor)
        for slot in _SLOTS:
            name = f"entropy-{slot}"
            if name not in there:
                await monitor.execute("device_add", {"driver": "virtio-rng-pci", "bus": slot, "id": name})
                return {f"device {name}": "child<virtio-rng-pci>"}
        raise NotNow("there is no slot")

    async def _unplug_card_again(self, monitor: Monitor) -> Changed:
        """One that was plugged: the guest has to let it go."""
        plugged = [name for name in await _peripherals(monitor) if name.startswith("entropy-")]
        if not plugged or not (await monitor.execute("query-status"))["running"]:
            raise NotNow("the guest cannot let it go")
        await _unplug(monitor, plugged[0])
        return {f"device {plugged[0]}": None}

    async def _pin(self, monitor: Monitor) -> Changed:
        all_of_them = sorted(os.sched_getaffinity(os.getpid()))
        wanted = {self._choices.choice(all_of_them)} if self._choices.random() < 0.7 else set(all_of_them)
        for thread in await _vcpus(monitor):
            os.sched_setaffinity(thread, wanted)
        return {"affinity": ",".join(map(str, sorted(wanted)))}

    async def _stop(self, monitor: Monitor) -> Changed:
        await monitor.execute("stop")
        return {"status": "paused"}

    async def _cont(self, monitor: Monitor) -> Changed:
        await monitor.execute("cont")
        return {"status": "running"}


def applied(facts: Facts, changed: Changed) -> Facts:
    """The facts after something was done."""
    merged: Changed = {**facts, **changed}
    return {name: value for name, value in merged.items() if value is not None}


def differences(expected: Facts, found: Facts) -> list[str]:
    """In what a guest is not what it should be."""
    return [
        f"{name}: {found.get(name)} instead of {expected.get(name)}"
        for name in sorted(expected.keys() | found.keys())
        if found.get(name) != expected.get(name)
    ]


def _drive(row: dict[str, Any]) -> str:
    """A short name of a drive, ``disk`` for that which the guest works with; empty for one that no device has."""
    last = str(row.get("qdev", "")).rpartition("/")[2]
    return "disk" if last == "virtio-backend" else last


async def _rows(monitor: Monitor) -> list[dict[str, Any]]:
    return [row for row in await monitor.execute("query-block") if _drive(row)]


async def _row(monitor: Monitor, name: str) -> dict[str, Any]:
    for row in await _rows(monitor):
        if _drive(row) == name:
            return row
    raise NotNow(f"there is no {name}")


async def _peripherals(monitor: Monitor) -> list[str]:
    return [str(entry["name"]) for entry in await monitor.execute("qom-list", {"path": "/machine/peripheral"})]


async def _vcpus(monitor: Monitor) -> list[int]:
    return [int(cpu["thread-id"]) for cpu in await monitor.execute("query-cpus-fast")]


async def _unplug(monitor: Monitor, name: str) -> None:
    await monitor.execute("device_del", {"id": name})
    await _until(monitor, "qom-list", lambda entries: name not in [entry["name"] for entry in entries])


async def _until(monitor: Monitor, question: str, condition: Callable[[Any], bool]) -> None:
    """
    Wait until QEMU's answer is as wanted.

    :raises CommandError: not in time.
    """
    deadline = asyncio.get_running_loop().time() + _PATIENCE
    arguments = {"path": "/machine/peripheral"} if question == "qom-list" else None
    while not condition(await monitor.execute(question, arguments)):
        if asyncio.get_running_loop().time() > deadline:
            raise CommandError(question, f"not as expected within {_PATIENCE:g} s")
        await asyncio.sleep(_POLL)
