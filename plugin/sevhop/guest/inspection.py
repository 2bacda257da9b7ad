"""
A running QEMU's description of its guest, read once.

The same description is read from the source and from the destination; a hop compares the two before the source is
stopped.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from sevhop_qmp import ram_blocks
from sevhop_qmp.errors import CommandError, SevhopError
from sevhop_qmp.invalid_data import protocol_errors
from sevhop_qmp.monitor import Commands
from sevhop_qmp.process import QemuProcess
from sevhop_qmp.ram_blocks import RamBlock

#: Bit of the SEV policy that asks for encrypted registers (AMD SEV API, table "Guest Policy").
_POLICY_ES = 0x4

#: A backend of this type in what ``info network`` prints.
_USER_NETWORK = re.compile(r": index=0,type=user,")

#: RAM blocks that were encrypted at launch (LAUNCH_UPDATE). Their content depends on its physical address and cannot be
#: copied.
ENCRYPTED_BLOCKS = frozenset({"pc.bios", "system.flash0"})


class MemoryBackend(NamedTuple):
    """One memory backend object: its QOM type (``memory-backend-memfd``), bytes, and whether it is shared."""

    name: str
    kind: str
    size: int
    share: bool


@dataclass(frozen=True)
class SevContext:
    """
    The guest's SEV context.

    :ivar kind: ``none``, ``sev``, ``sev-es`` or ``sev-snp``.
    :ivar handle: the firmware's handle of the guest.
    :ivar measurement: launch measurement in hexadecimal, empty when QEMU does not report it.
    :ivar device: the SEV device of the host that QEMU uses.
    :ivar typed: whether the VM has a VM type of its own for SEV (``legacy-vm-type=off``).
    """

    kind: str
    policy: int = 0
    handle: int = 0
    measurement: str = ""
    device: str = "/dev/sev"
    typed: bool = False


class Guest(NamedTuple):
    """
    A guest as its QEMU describes it.

    :ivar name: its name (``-name``), or the pid of its QEMU.
    :ivar state: QEMU's run state, ``running`` or ``paused`` or another.
    :ivar accelerator: ``kvm`` or ``tcg``.
    :ivar vcpu_threads: ids of its vCPU threads.
    :ivar memory: bytes of RAM at start.
    :ivar devices: devices with an id, path → type.
    :ivar blockers: QEMU's migration blockers, also for devices that cannot be migrated.
    :ivar jobs: block jobs and other long tasks in progress.
    :ivar blocks: its RAM blocks by name.
    :ivar user_networks: the number of its network backends of type ``user``.
    """

    name: str
    version: str
    machine_type: str
    state: str
    accelerator: str
    context: SevContext
    vcpu_threads: frozenset[int]
    memory: int
    backends: tuple[MemoryBackend, ...]
    devices: dict[str, str]
    blockers: tuple[str, ...]
    jobs: tuple[str, ...]
    blocks: dict[str, RamBlock]
    user_networks: int = 0

    @property
    def vcpus(self) -> int:
        """Number of its processors."""
        return len(self.vcpu_threads)


async def inspect(monitor: Commands, process: QemuProcess) -> Guest:
    """
    Read the description of a guest.

    :raises SevhopError: QEMU does not answer, or its answers make no sense.
    """
    with protocol_errors(monitor.name):
        kvm = await monitor.execute("query-kvm")
        summary = await monitor.execute("query-memory-size-summary")
        machine = await monitor.execute("qom-get", {"path": "/machine", "property": "type"})
        named = await monitor.execute("query-name")
        status = await monitor.execute("query-status")
        migration = await monitor.execute("query-migrate")
        return Guest(
            name=str(named.get("name") or f"pid {process.pid}"),
            version=monitor.version,
            machine_type=str(machine).removesuffix("-machine"),
            state=str(status["status"]),
            accelerator="kvm" if kvm["enabled"] else "tcg",
            context=await _context(monitor),
            vcpu_threads=frozenset(int(cpu["thread-id"]) for cpu in await monitor.execute("query-cpus-fast")),
            memory=int(summary["base-memory"]),
            backends=await _backends(monitor),
            devices=await _devices(monitor),
            blockers=tuple(str(reason) for reason in migration.get("blocked-reasons", ())),
            jobs=await _jobs(monitor, migration),
            blocks=await ram_blocks.read(monitor, process),
            user_networks=len(_USER_NETWORK.findall(await monitor.hmp("info network"))),
        )


async def _context(monitor: Commands) -> SevContext:
    try:
        sev = await monitor.execute("query-sev")
    except CommandError:
        return SevContext("none")  # newer QEMUs, of a guest without SEV
    if not sev["enabled"]:
        return SevContext("none")
    if sev.get("sev-type") == "sev-snp":
        return SevContext("sev-snp", int(sev.get("snp-policy", 0)))
    policy = int(sev["policy"])
    kind = "sev-es" if policy & _POLICY_ES else "sev"
    device, typed = await _object(monitor)
    return SevContext(kind, policy, int(sev["handle"]), await _measurement(monitor), device, typed)


async def _object(monitor: Commands) -> tuple[str, bool]:
    """The SEV device of the sev-guest object, and whether its VM has a type of its own."""
    path = await monitor.execute("qom-get", {"path": "/machine", "property": "confidential-guest-support"})
    device = await monitor.execute("qom-get", {"path": path, "property": "sev-device"})
    try:
        legacy = await monitor.execute("qom-get", {"path": path, "property": "legacy-vm-type"})
    except CommandError:
        return str(device), False  # before 9.1
    # 9.1 has a boolean.
    return str(device), legacy in ("off", False)


async def _measurement(monitor: Commands) -> str:
    try:
        answer = await monitor.execute("query-sev-launch-measure")
        return base64.b64decode(answer["data"], validate=True).hex()
    except (CommandError, binascii.Error):
        return ""


async def _backends(monitor: Commands) -> tuple[MemoryBackend, ...]:
    backends = []
    for row in await monitor.execute("query-memdev"):
        name = row.get("id", "")
        kind = await monitor.execute("qom-get", {"path": f"/objects/{name}", "property": "type"}) if name else ""
        backends.append(MemoryBackend(str(name), str(kind), int(row["size"]), bool(row["share"])))
    return tuple(backends)


async def _devices(monitor: Commands) -> dict[str, str]:
    rows = await monitor.execute("qom-list", {"path": "/machine/peripheral"})
    return {
        str(row["name"]): row["type"].removeprefix("child<").removesuffix(">")
        for row in rows
        if row["type"].startswith("child<")
    }


async def _jobs(monitor: Commands, migration: dict[str, Any]) -> tuple[str, ...]:
    jobs = [f"{row['type']} {row['id']}" for row in await monitor.execute("query-jobs")]
    if migration.get("status") in ("setup", "active", "device", "pre-switchover", "cancelling", "postcopy-active"):
        jobs.append("migration")
    dump = await monitor.execute("query-dump")
    if dump["status"] == "active":
        jobs.append("memory dump")
    return tuple(jobs)


async def jobs(monitor: Commands) -> tuple[str, ...]:
    """
    What is in progress in a QEMU: block jobs, a migration (saving and dumping a domain is one), a backup.

    :raises SevhopError: QEMU does not answer, or its answers make no sense.
    """
    with protocol_errors(monitor.name):
        return await _jobs(monitor, await monitor.execute("query-migrate"))


async def verify_unchanged(monitor: Commands, guest: Guest) -> None:
    """
    Verify what other clients can change while a guest runs: its run state, devices and jobs.

    :param guest: as it was inspected, without any job.
    :raises SevhopError: it has changed.
    """
    with protocol_errors(monitor.name):
        status = str((await monitor.execute("query-status"))["status"])
        devices = await _devices(monitor)
    begun = await jobs(monitor)
    if status != guest.state:
        raise SevhopError(f"the guest was {guest.state} and is {status}: another client has changed that", "try again")
    for name in devices.keys() ^ guest.devices.keys():
        raise SevhopError(f"device {name} was plugged or unplugged by another client", "try again")
    if begun:
        raise SevhopError(f"another client has begun a job: {', '.join(begun)}", "try again when it has ended")


def differences(source: Guest, destination: Guest) -> list[str]:
    """
    How the destination's machine differs from the source's; empty when a hop may continue.


    RAM blocks are compared where they are paired (:func:`sevhop_qmp.ram_blocks.private_pairs`).
    """
    found = [
        f"{label} is {theirs} in the new QEMU, {ours} in the old QEMU"
        for label, ours, theirs in (
            ("machine type", source.machine_type, destination.machine_type),
            ("accelerator", source.accelerator, destination.accelerator),
            ("number of vCPUs", source.vcpus, destination.vcpus),
            ("memory size", source.memory, destination.memory),
            ("SEV context", source.context.kind, destination.context.kind),
            ("SEV policy", source.context.policy, destination.context.policy),
        )
        if ours != theirs
    ]
    found += [
        f"device {name} is missing in the new QEMU" for name in sorted(source.devices.keys() - destination.devices)
    ]
    found += [f"device {name} is not in the old QEMU" for name in sorted(destination.devices.keys() - source.devices)]
    return found
