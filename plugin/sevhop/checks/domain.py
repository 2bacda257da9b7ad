"""
Can this libvirt domain hop? :mod:`sevhop.checks.guest` checks the guest; here is what depends on libvirt. Read-only.
"""

from __future__ import annotations

import asyncio
import contextlib
import shlex
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from xml.etree import ElementTree

from sevhop_qmp import selinux as selinux_kernel
from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import QemuProcess, path_on_disk

from ..cancellation import shielded
from ..disks.block_graph import BlockGraph
from ..guest import inspection, kept_path
from ..install import apparmor, selinux, verification
from ..libvirt import domain_xml, prepared_xml, resources
from ..libvirt.connection import Connection
from ..libvirt.daemon import NO_DOMAIN, DomainError
from ..libvirt.domain import Domain
from ..libvirt.domain_monitor import DomainMonitor
from ..process import apparmor_profile
from ..records import journal
from . import definition, earlier_hop, reboot, registers, restart
from . import guest as guest_checks
from .registers import Registers
from .result import CheckResult, Status, failed, passed


@dataclass(frozen=True)
class Examined:
    """
    An active domain, with the results of its checks.

    :ivar tree: the results.
    :ivar xml: the domain as it runs, without what earlier hops have added.
    :ivar old, new: the emulator it runs in, and the one to upgrade to.
    :ivar flag: see :class:`.registers.Registers`.
    """

    tree: CheckResult
    monitor: DomainMonitor
    process: QemuProcess
    guest: inspection.Guest
    disks: BlockGraph
    xml: str
    old: str
    new: str
    flag: int = 0


@contextlib.contextmanager
def or_its_hop(name: str) -> Iterator[None]:
    """
    Around the lookup of a domain: while its guest is elsewhere libvirt does not know a transient one.

    :param name: or the UUID.
    :raises HopInterrupted: instead of the error that there is no such domain.
    :raises HopInProgress: likewise.
    """
    try:
        yield
    except DomainError as err:
        if err.code == NO_DOMAIN:
            try:
                journal.expect_none(name)
            except journal.HopInterrupted as hop:
                raise hop from err
            except journal.JournalError:
                pass  # only root can know
        raise


@contextlib.asynccontextmanager
async def examine(
    connection: Connection, domain: Domain, emulator: str | None = None, *, in_full: bool = False
) -> AsyncIterator[Examined]:
    """
    Test whether a domain can hop. Nothing is touched.

    :param emulator: the QEMU to upgrade to; by default the one it was started from, as it is on disk now.
    :param in_full: also what libvirt reports only by an error, which it logs.
    :raises SevhopError: the domain is not active, its guest is elsewhere, or it cannot be inspected at all.
    """
    if not await domain.active():
        journal.expect_none(domain.uuid)  # it must not be started then
        raise SevhopError(f"domain {domain.name} is not running", "start it; an upgrade is for running guests")
    if await domain.job():
        # Until it ends libvirt passes no commands on to QEMU.
        raise SevhopError(f"a job of domain {domain.name} is in progress", "wait for it to end, or cancel it")
    process = QemuProcess.open(domain.pid())
    try:
        monitor = await domain.monitor()
        try:
            xml = domain_xml.without_additions(await domain.xml())
            old = domain_xml.describe(xml).emulator
            new = emulator or kept_path.original(path_on_disk(old))
            domain_xml.with_emulator(xml, new)
        except domain_xml.DomainXmlError as err:
            raise SevhopError(
                f"cannot read the XML of domain {domain.name}: {err}", f"see virsh dumpxml {domain.name}"
            ) from err
        if kept_path.original(new) != new:
            raise SevhopError(f"{new} is kept for a rollback only", "name an emulator that is installed")
        found = await inspection.inspect(monitor, process)
        graph, disks = await guest_checks.disks(monitor, process)
        volumes = await _volumes(connection, xml)
        if disks.status is Status.PASS and volumes is not None and (unknown := unknown_to_libvirt(graph, xml, volumes)):
            disks = failed(
                "disks",
                f"libvirt does not know of it, and would start the new QEMU with another disk: {unknown}",
                "undo what was changed behind libvirt's back, or shut the domain down and start it",
            )
        state = await registers.examine(found, process, monitor)
        # In a thread: it runs emulators to probe them, and another guest may be stopped meanwhile.
        action, persistent = domain_xml.describe(xml).on_reboot, await domain.persistent()
        rebooted = reboot.domain(found, action, persistent=persistent)
        work = asyncio.to_thread(_without_libvirt, found, process, new, xml, domain.uuid, state, rebooted)
        tree = await shielded(work)
        subject = restart.Subject(monitor, process, found, graph, xml, await domain.live_xml(), old, new)
        tree.children += [
            disks,
            await _libvirt(connection, domain, in_full),
            await restart.examine(connection, subject),
        ]
        await _add_hints(connection, domain, tree, found.machine_type)
        yield Examined(tree, monitor, process, found, graph, xml, old, new, state.flag)
    finally:
        process.close()


async def _add_hints(connection: Connection, domain: Domain, tree: CheckResult, machine: str) -> None:
    """What to do about what the domain's definition decides."""
    decided = [result for result in tree.failures() if result.restart and result.name in definition.DECIDES]
    if decided and (hint := await definition.hint(connection, domain, machine)):
        for result in decided:
            result.hint = hint


def _without_libvirt(
    found: inspection.Guest,
    process: QemuProcess,
    new: str,
    xml: str,
    uuid: str,
    state: Registers,
    rebooted: list[CheckResult],
) -> CheckResult:
    """What is checked without the daemon."""
    tree = guest_checks.domain(found, process, new, state, rebooted, f"set {prepared_xml.MEMORY_BACKING}")
    # First: a device that cannot be re-created may have memory of its own, for which there is no hint either.
    tree.children[:0] = [devices(xml)]
    tree.children += [_confinement(process, uuid)]
    return tree


#: Devices whose backend cannot be handed over or re-created: where they are in the XML, and why.
_NOT_RECREATABLE = (
    ("devices/tpm/backend[@type='passthrough']", "the state of a host device cannot be saved"),
    ("devices/tpm/backend[@type='external']", "its server serves one QEMU only"),
    ("devices/filesystem", "its server exits with the old QEMU"),
    ("devices/shmem", "its server serves one QEMU only"),
    ("devices/hostdev", "the state of a host device cannot be saved"),
    ("devices/interface[@type='hostdev']", "the state of a host device cannot be saved"),
    ("devices/interface[@type='vdpa']", "the state of a host device cannot be saved"),
    ("devices/interface[@type='vhostuser']", "its server serves one QEMU only"),
    ("devices/disk[@type='nvme']", "the state of a host device cannot be saved"),
    ("devices/disk[@type='vhostuser']", "its server serves one QEMU only"),
    ("devices/vsock", "its connections are lost with the old QEMU"),
    ("devices/disk/transient", "libvirt discards the disk's changes when the old QEMU exits"),
    ("devices/video/driver[@name='vhostuser']", "its server serves one QEMU only"),
    ("devices/memory[@model='nvdimm']", "its memory is a file"),
    ("devices/memory[@model='virtio-pmem']", "its memory is a file"),
    ("devices/memory[@model='virtio-mem']", "QEMU discards its contents when it starts"),
)


def devices(xml: str) -> CheckResult:
    """
    Whether libvirt can give the destination every device of the domain. Taps, sockets and ptys are re-created.

    :param xml: of the domain as it runs, written by libvirt.
    """
    domain = ElementTree.fromstring(xml)
    found = {}
    for path, reason in _NOT_RECREATABLE:
        if domain.find(path) is not None:
            found[_as_written(path)] = reason
    if found:
        return failed(
            "devices",
            "; ".join(f"{name}: {reason}" for name, reason in found.items()),
            "remove the device; otherwise the domain has to be shut down and started",
        )
    return passed("devices", "all can be re-created")


async def _volumes(connection: Connection, xml: str) -> frozenset[str] | None:
    """The paths of the volumes of a domain; None if libvirt cannot find one, of which there is a test."""
    found = set()
    for source in ElementTree.fromstring(xml).iterfind("devices/disk[@type='volume']/source"):
        try:
            found.add(await resources.volume_path(connection, source.get("pool", ""), source.get("volume", "")))
        except SevhopError:
            return None
    return frozenset(found)


def unknown_to_libvirt(graph: BlockGraph, xml: str, volumes: frozenset[str] = frozenset()) -> str:
    """
    Whether each drive has the image that the domain's XML has; libvirt starts the destination with those. Backing
    images are named in the images themselves.

    :param volumes: the paths of its volumes, which are not in the XML.
    :return: the first drive that has another one; empty when there is none.
    """
    domain = ElementTree.fromstring(xml)
    described = {
        source.get(attribute) for source in domain.iterfind("devices/disk/source") for attribute in ("file", "dev")
    } - {None}
    described |= {volume for volume in volumes if volume.startswith("/")}
    arguments = [argument.get("value", "") for argument in domain.iterfind(f"{_COMMAND_LINE}/{_ARGUMENT}")]
    present = set()
    for disk in graph.disks.values():
        if not disk.root or disk.qdev.startswith("/machine/system"):  # firmware
            continue
        path = graph.image_of(disk.root)
        present.add(path)
        if path.startswith("/") and path not in described and not any(path in argument for argument in arguments):
            return f"disk {disk.name} is {path}"
    missing = sorted(str(path) for path in described - present)
    return f"{missing[0]} is in no drive" if missing else ""


_QEMU = "{http://libvirt.org/schemas/domain/qemu/1.0}"
_COMMAND_LINE, _ARGUMENT = f"{_QEMU}commandline", f"{_QEMU}arg"


def _as_written(path: str) -> str:
    """An element of :data:`_NOT_RECREATABLE` as in the documentation, such as ``<disk type='nvme'>``."""
    inner, _, attribute = path.removeprefix("devices/").rstrip("]").partition("[@")
    outer, _, name = inner.rpartition("/")
    element = f"<{name} {attribute}>" if attribute else f"<{name}>"
    return f"{element} of a <{outer}>" if outer else element


def _confinement(process: QemuProcess, uuid: str) -> CheckResult:
    """Whether a destination that is confined like the source may do what a hop needs."""
    name = "confinement"
    confinement = process.confinement
    if confinement in apparmor_profile.UNCONFINED:
        return passed(name, "none")
    if selinux_kernel.is_context(confinement):
        if reason := selinux.reason_against(confinement, verification.daemons().values()):
            return failed(name, reason, "run: sevhop install")
        return passed(name, f"SELinux, {confinement}")
    label = apparmor_profile.label(confinement)
    if label is None:
        return failed(name, f"{confinement}: a security module that is not known", "<seclabel type='none'/>")
    if label.mode != "complain":
        if label.profile != f"libvirt-{uuid}":
            return failed(
                name,
                f"the profile {label.profile} is not one that libvirt makes, so sevhop cannot add its rules to it",
                "<seclabel type='dynamic' model='apparmor'/>",
            )
        if not apparmor.in_place():
            return failed(name, "AppArmor would keep the new QEMU from the keeper", "run: sevhop install")
    return passed(name, f"AppArmor, {confinement}")


async def _libvirt(connection: Connection, domain: Domain, in_full: bool) -> CheckResult:
    name = "libvirt"
    if await domain.managed_save():
        hint = f"virsh managedsave-remove {shlex.quote(domain.name)}"
        return failed(name, "the domain has a managed save image", hint)
    if not await domain.persistent():
        snapshots, checkpoints = await domain.snapshots_and_checkpoints()
        if snapshots or checkpoints:
            return failed(
                name,
                f"it is transient, and libvirt forgets its snapshots ({snapshots}) and checkpoints ({checkpoints}) "
                "when the old QEMU exits",
                "define it (virsh define), or have libvirt forget them (virsh snapshot-delete --metadata, "
                "checkpoint-delete --metadata)",
            )
    if in_full and await domain.autodestroy():
        return failed(
            name,
            "libvirt destroys it when the client that started it disconnects, but would not after a hop",
            "start it without --autodestroy",
            restart=True,
        )
    if reason := await asyncio.to_thread(verification.reason_against):
        return failed(name, reason, "run: sevhop install")
    version = await connection.version()
    note = "" if await connection.tested() else ", older than was tested,"
    hook = "calls the hook" if verification.is_recorded() else "has the hook, which an upgrade verifies first"
    return passed(name, f"{verification.daemon_name()} {version}{note} {hook}")


async def check_domain(uri: str, name: str, emulator: str | None) -> CheckResult:
    """
    Test whether a domain can hop. Nothing is touched.

    :raises SevhopError: the domain is not active, or cannot be inspected at all.
    """
    connection = await Connection.open(uri)
    try:
        with or_its_hop(name):
            domain = await connection.look_up(name)
        async with examine(connection, domain, emulator, in_full=True) as examined:
            return earlier_hop.add(examined.tree, domain.uuid)
    finally:
        connection.close()
