"""
Can this domain of libvirt hop? :mod:`.check` looks at the guest; here is what depends on libvirt.

Nothing is touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from sevhop_qmp import adopt
from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import QemuProcess, path_on_disk

from . import check, domain_xml, guest, installation
from .domain import Connection, Domain, DomainMonitor
from .finding import Finding, failed, passed


@dataclass(frozen=True)
class Examined:
    """
    An active domain, looked at.

    :ivar tree: what was tested.
    :ivar xml: the domain as it runs, without what earlier hops have added.
    :ivar old, new: the emulator it runs in, and the one to go to.
    """

    tree: Finding
    monitor: DomainMonitor
    process: QemuProcess
    guest: guest.Guest
    xml: str
    old: str
    new: str


@contextlib.asynccontextmanager
async def examine(connection: Connection, domain: Domain, emulator: str | None = None) -> AsyncIterator[Examined]:
    """
    Test whether a domain can hop. Nothing is touched.

    :param emulator: the QEMU to go to; by default the one it was started from, as it is on disk now.
    :raises SevhopError: the domain is not active, or cannot be looked into at all.
    """
    if not await domain.active():
        raise SevhopError(f"domain {domain.name} is not running", "start it; an upgrade is for running guests")
    process = QemuProcess.open(domain.pid())
    try:
        monitor = await domain.monitor()
        xml = domain_xml.without_additions(await domain.xml())
        old = domain_xml.describe(xml).emulator
        new = emulator or path_on_disk(old)
        found = await guest.inspect(monitor, process)
        tree = check.domain(found, process, new)
        tree.children += [_devices(xml), _library(process), await _libvirt(connection, domain)]
        yield Examined(tree, monitor, process, found, xml, old, new)
    finally:
        process.close()


def _devices(xml: str) -> Finding:
    """What has state outside of QEMU, which the end of the source would end as well."""
    found = [f"<{name}>" for name in ("tpm", "filesystem", "hostdev", "shmem") if f"<{name} " in xml]
    if found:
        return failed("devices", f"{', '.join(found)} would lose its state", "remove the device")
    return passed("devices", "none with state of its own")


def _library(process: QemuProcess) -> Finding:
    name = "library"
    path, identity = adopt.library_path(), process.credentials
    if not identity.may("r", path):
        return failed(name, f"the user of QEMU ({identity.uid}) cannot read {path}", "install it for all users")
    confinement = process.confinement
    if confinement not in ("", "unconfined"):
        return failed(
            name,
            f"the guest is confined ({confinement}), and QEMU could neither load {path} nor reach the keeper",
            "security labels of libvirt domains are not supported yet: <seclabel type='none'/>",
        )
    return passed(name, str(path))


async def _libvirt(connection: Connection, domain: Domain) -> Finding:
    name = "libvirt"
    if await domain.managed_save():
        return failed(name, "the domain has a managed save image", f"virsh managedsave-remove {domain.name}")
    if await domain.job():
        return failed(name, "a job of the domain is under way", "wait for it to end, or cancel it")
    if not await installation.hook_answers(connection):
        return failed(name, "the daemon does not call sevhop's hook", "run: sevhop install")
    return passed(name, f"{await connection.version()}, calls the hook")


async def check_domain(uri: str, name: str, emulator: str | None) -> Finding:
    """
    Test whether a domain can hop. Nothing is touched.

    :raises SevhopError: the domain is not active, or cannot be looked into at all.
    """
    connection = await Connection.open(uri)
    try:
        async with examine(connection, await connection.domain(name), emulator) as examined:
            return examined.tree
    finally:
        connection.close()
