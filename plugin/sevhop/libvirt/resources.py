"""
What a domain needs from other drivers of libvirt's when it starts: networks, filters, secrets, volumes, a processor.

Nothing is changed. Most functions return why libvirt could not start a domain with it; empty if it could.
"""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import libvirt

from .connection import Connection
from .daemon import RESTORE_TIMEOUT, DomainError

#: What a secret that is named by its usage is used for (virSecretUsageType), by the ``type`` of the element.
_USAGES = {
    "passphrase": libvirt.VIR_SECRET_USAGE_TYPE_VOLUME,
    "ceph": libvirt.VIR_SECRET_USAGE_TYPE_CEPH,
    "iscsi": libvirt.VIR_SECRET_USAGE_TYPE_ISCSI,
    "tls": libvirt.VIR_SECRET_USAGE_TYPE_TLS,
}


async def network(connection: Connection, name: str) -> str:
    """Of a network of libvirt's: it must be active."""
    try:
        found = await connection.call(connection.raw.networkLookupByName, name)
        if not await connection.call(found.isActive):
            return f"network {name} is not active"
    except DomainError as err:
        return f"network {name}: {err.message}"
    return ""


async def network_filter(connection: Connection, name: str) -> str:
    """Of a network filter: it must be defined."""
    try:
        await connection.call(connection.raw.nwfilterLookupByName, name)
    except DomainError as err:
        return f"network filter {name}: {err.message}"
    return ""


async def volume_path(connection: Connection, pool: str, name: str) -> str:
    """
    The path of a volume, or whatever the pool has in its place.

    :raises DomainError: there is none, or its pool is not active.
    """
    found = await connection.call(connection.raw.storagePoolLookupByName, pool)
    if not await connection.call(found.isActive):
        raise DomainError(f"storage pool {pool} is not active")
    return str(await connection.call((await connection.call(found.storageVolLookupByName, name)).path))


async def secret(connection: Connection, element: ElementTree.Element) -> str:
    """
    Of a secret: it must be defined, and have a value. A private one shows nobody whether it has.

    :param element: ``<secret>`` as in a domain, with its UUID or its usage.
    """
    uuid, usage = element.get("uuid", ""), element.get("usage", "")
    try:
        if uuid:
            found = await connection.call(connection.raw.secretLookupByUUIDString, uuid)
        else:
            kind = _USAGES.get(element.get("type", ""), libvirt.VIR_SECRET_USAGE_TYPE_NONE)
            found = await connection.call(connection.raw.secretLookupByUsage, kind, usage)
        await connection.call(_verify_value, found)
    except DomainError as err:
        return "" if err.code == libvirt.VIR_ERR_INVALID_SECRET else f"secret {uuid or usage}: {err.message}"
    return ""


def _verify_value(found: Any) -> None:
    """The value itself is not kept."""
    found.value()


async def processor(connection: Connection, emulator: str, arch: str, machine: str, kind: str, cpu: str) -> str:
    """
    Of a processor: an emulator must have all its features on this host.

    :param cpu: its element, with a model and features.
    """
    flags = libvirt.VIR_CONNECT_COMPARE_CPU_FAIL_INCOMPATIBLE
    compare = connection.raw.compareHypervisorCPU
    try:
        await connection.call(compare, emulator, arch, machine, kind, cpu, flags, timeout=RESTORE_TIMEOUT)
    except DomainError as err:
        if err.code == libvirt.VIR_ERR_CPU_INCOMPATIBLE:
            return err.message
    return ""  # also where the daemon cannot compare them
