"""
What the persistent definition of a domain lacks, so that its guest could hop when it is started the next time.

Nothing is changed here. :mod:`sevhop.libvirt.prepared_xml` has what is demanded of every domain; here is what depends
on the host.
"""

from __future__ import annotations

import asyncio
import re
import shlex
from dataclasses import dataclass, replace

from sevhop_qmp.errors import SevhopError

from ..guest import reboot
from ..guest.emulator import probe
from ..libvirt import domain_xml, prepared_xml
from ..libvirt.connection import Connection
from ..libvirt.domain import Domain
from ..libvirt.prepared_xml import Prepared, Wanted
from . import sev_host

#: The version of a machine type, at the end of its name or before what a distribution adds.
_VERSION = re.compile(r"-(?P<major>\d+)\.(?P<minor>\d+)\b")
#: Since this QEMU, and with its machine types, a VM for SEV gets a type of its own, if the kernel has that.
_TYPED_SINCE = (9, 1)
#: The tests of ``sevhop check`` that a prepared definition passes when its domain is started again.
DECIDES = ("memory", "machine type alias")
#: Bit of the SEV policy that asks for encrypted registers (AMD SEV API, table "Guest Policy").
_POLICY_ES = 0x4


@dataclass(frozen=True)
class Lacking:
    """
    What a definition lacks.

    :ivar wanted: what is wanted that does not follow from the definition alone.
    :ivar prepared: the definition with all that.
    :ivar notes: what keeps the guest from hopping all the same, or makes it hop with a disadvantage.
    """

    wanted: Wanted
    prepared: Prepared
    notes: tuple[str, ...] = ()


async def examine(connection: Connection, xml: str, machine: str = "") -> Lacking:
    """
    Find out what a definition lacks.

    :param xml: of a domain.
    :param machine: the machine type that the guest has now, if it runs.
    :raises SevhopError: libvirt does not answer, or this is no domain.
    """
    try:
        described = domain_xml.describe(xml)
        encryption = prepared_xml.encryption(xml)
        wanted, notes = Wanted(await _machine_type(connection, described, machine)), list[str]()
        if encryption.kind == "sev":
            share, notes = await asyncio.to_thread(_sev, described, wanted.machine or described.machine, encryption)
            wanted = replace(wanted, shared_firmware=share)
        elif encryption.kind:
            notes = [f"no kernel can move the context of a guest with {encryption.kind}"]
        return Lacking(wanted, prepared_xml.prepare(xml, wanted), tuple(notes))
    except domain_xml.DomainXmlError as err:
        raise SevhopError(f"cannot read the definition: {err}", "see virsh dumpxml --inactive") from err


async def _machine_type(connection: Connection, described: domain_xml.Description, machine: str) -> str:
    """What an alias means; empty if the definition has none."""
    if not described.machine or _VERSION.search(described.machine):
        return ""
    kind = (described.emulator, described.arch, described.machine, described.kind)
    real = await connection.machine_type(*kind)
    return "" if real == described.machine else machine or real


def _sev(
    described: domain_xml.Description, machine: str, encryption: prepared_xml.Encryption
) -> tuple[tuple[str, ...], list[str]]:
    """The arguments that an SEV guest needs in its emulator, and notes."""
    try:
        version = tuple(map(int, probe(described.emulator).version.split(".")))
    except SevhopError as err:
        return (), [f"what its emulator can do is not known: {err.message}"]
    notes = []
    found = _VERSION.search(machine)
    typed = found is not None and (int(found["major"]), int(found["minor"])) >= _TYPED_SINCE
    if typed and version >= _TYPED_SINCE and sev_host.kernel_has_types():
        notes.append(f"SEV guests with machine type {machine} cannot hop: choose one of 9.0 or earlier")
    if encryption.policy & _POLICY_ES:
        return (), notes
    if version < reboot.SINCE:
        notes.append("a reboot after a hop is a shutdown, unless its emulator is QEMU 10.0 or later")
        return (), notes
    return reboot.SHARED_FIRMWARE, notes


async def hint(connection: Connection, domain: Domain, machine: str) -> str:
    """
    What to do about a running guest that can hop only when it has been started again; empty if that is not known.

    :param machine: the machine type that it has now.
    """
    try:
        if not await domain.persistent():
            return f"start it again with {prepared_xml.MEMORY_BACKING}, and a machine type that is no alias, in its XML"
        lacking = await examine(connection, await domain.inactive_xml(), machine)
    except SevhopError:
        return ""
    then = "shut the domain down and start it"
    if lacking.prepared.changes:
        return f"run: sevhop prepare {shlex.quote(domain.name)}; then {then}"
    return f"{then}: its definition is prepared"
