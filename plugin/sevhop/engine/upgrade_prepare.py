"""The phases of an upgrade before the guest is stopped: check, acquire, rehearse, prepare."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import QemuProcess
from sevhop_qmp.protected_state import ProtectedState
from sevhop_qmp.saved_device_state import SavedDeviceState

from ..checks.domain import examine, or_its_hop
from ..disks import comparison
from ..disks.block_graph import BlockGraph
from ..disks.disk_guard import DiskGuard
from ..errors import SAVED_HINT, GuestState, Refused, RolledBack
from ..guest import cpu_features, emulator, inspection, reboot, runtime_settings, saved_settings
from ..guest.inspection import ENCRYPTED_BLOCKS
from ..install import verification
from ..keeper.client import KeeperClient
from ..keeper.config import KeeperConfig
from ..libvirt import domain_xml, lock_manager
from ..libvirt.connection import Connection
from ..libvirt.domain import Domain
from ..libvirt.domain_monitor import DomainMonitor
from ..options import UpgradeOptions
from ..process import cgroup_memory
from ..records import journal
from ..records.hop_record import HopRecord, Process
from . import protected_state
from .check import verify_can_hop
from .rehearsal import Rehearsal, Subject
from .rehearsal_command_line import Unrehearsable
from .stopped_guest import verify_alive
from .transaction import Transaction
from .way_back import WayBack


@dataclass(frozen=True)
class CheckedDomain:
    """
    A domain that can be upgraded. See :func:`check`.

    :ivar xml: the domain as it runs, without what earlier hops have added.
    :ivar old, new: the emulator that it runs in, and the one to upgrade to.
    :ivar flag: see :class:`sevhop.checks.registers.Registers`.
    """

    connection: Connection
    domain: Domain
    monitor: DomainMonitor
    source: QemuProcess
    guest: inspection.Guest
    disks: BlockGraph
    xml: str
    old: str
    new: str
    flag: int = 0

    @property
    def encrypted(self) -> frozenset[str]:
        """Names of the RAM blocks whose content cannot be copied."""
        return frozenset() if self.guest.context.kind == "none" else ENCRYPTED_BLOCKS

    async def saved_by_another(self) -> bool:
        """Whether another client has saved the domain, so that there is an image of it to restore."""
        with contextlib.suppress(SevhopError):
            return await self.domain.saved()
        return False


@dataclass(frozen=True)
class PreparedDomain:
    """
    All that is needed to stop the guest. See :func:`prepare`.

    :ivar piped: whether the new emulator can load a state only from a pipe.
    :ivar displays: the ports that libvirt has chosen for the displays.
    :ivar disks: guards those of the source.
    :ivar state: the file that the device state is saved to.
    :ivar flag: of the source, which is cleared for the time of the stop; None if it need not be.
    """

    piped: bool
    displays: list[dict[str, str]]
    disks: DiskGuard
    state: SavedDeviceState
    flag: ProtectedState | None = None


async def check(hop: Transaction, uri: str, name: str, options: UpgradeOptions) -> CheckedDomain:
    """
    Nothing is touched: can this guest hop, to this emulator, on this host?

    :raises Refused: it cannot.
    """
    try:
        connection = await Connection.open(uri)
        hop.resources.callback(connection.close)
        with or_its_hop(name):
            domain = await connection.domain(name)
        # If an earlier hop was interrupted, the domain may be shut off because of that.
        journal.expect_none(domain.uuid)
        examined = await hop.resources.enter_async_context(examine(connection, domain, options.emulator, in_full=True))
        if not options.dry_run and not examined.tree.failures():
            await verification.ensure_hook(connection)
    except SevhopError as err:
        raise Refused(err.message, err.hint) from err
    verify_can_hop(examined.tree)
    checked = CheckedDomain(
        connection,
        domain,
        examined.monitor,
        examined.process,
        examined.guest,
        examined.disks,
        examined.xml,
        examined.old,
        examined.new,
        examined.flag,
    )
    hop.report.emulator = checked.new
    hop.report.context = checked.guest.context.kind
    hop.report.source_pid = checked.source.pid
    hop.report.source_version = checked.monitor.version
    hop.rollback.push(lambda: _verify_alive(checked))
    if checked.guest.state != "running":
        hop.downtime.disown()
    if not options.dry_run:
        await hop.begin_record(
            HopRecord(
                kind="domain",
                guest=domain.name,
                uri=uri,
                uuid=domain.uuid,
                context=checked.guest.context.kind,
                running=checked.guest.state == "running",
                source=Process.of(checked.source),
                old=checked.old,
                new=checked.new,
                protected_state=checked.flag,
            )
        )
    return checked


async def _verify_alive(checked: CheckedDomain) -> None:
    """
    :raises GuestLost: the rollback has nobody to resume.
    :raises RolledBack: that is so because another client has saved the guest, in whose image it is.
    """
    if not await checked.source.lives_on() and await checked.saved_by_another():
        raise RolledBack("another client has saved the domain", SAVED_HINT, GuestState.SAVED)
    await verify_alive(checked.source)


async def acquire(hop: Transaction, options: UpgradeOptions, checked: CheckedDomain) -> KeeperClient:
    """
    Start a keeper, which takes the source's VM and memory.

    :raises KeeperError: it cannot.
    """
    identity = checked.source.credentials
    config = KeeperConfig(
        name=checked.domain.name,
        uuid=checked.domain.uuid,
        uri=checked.connection.uri,
        pid=checked.source.pid,
        uid=identity.uid,
        gid=identity.gid,
        emulator=checked.new,
        context=checked.guest.context,
        blocks=tuple(checked.guest.blocks.values()),
        disks=checked.disks,
        encrypted=tuple(checked.encrypted),
        stops_at_reboot=reboot.stops(checked.guest),
        move_deadline=options.move_deadline,
        step_timeout=options.step_timeout,
    )
    starting = asyncio.ensure_future(KeeperClient.start(config))
    try:
        await asyncio.shield(starting)
    finally:
        # Interrupted or not: a keeper that was started must be released later.
        keeper = await starting
        hop.resources.callback(keeper.close)
        hop.rollback.push(keeper.release)
        hop.record(directory=str(keeper.directory))
    await protected_state.forbid_resets(hop, checked.monitor, checked.source, checked.flag)
    return keeper


async def rehearse(
    hop: Transaction, options: UpgradeOptions, checked: CheckedDomain, keeper: KeeperClient, back: WayBack
) -> bool:
    """
    Have the new emulator load a copy of the device state.

    :return: whether the domain could be rehearsed.
    :raises Refused: the new emulator cannot load it; or a rehearsal is not possible, and neither is a rollback.
    """
    subject = Subject(
        name=checked.domain.name,
        xml=checked.xml,
        emulator=checked.new,
        monitor=checked.monitor,
        process=checked.source,
        guest=checked.guest,
        encrypted=checked.encrypted,
        directory=keeper.directory / "rehearsal",
        domain=checked.domain,
        leases=lock_manager.in_use(),
        stopped=lambda by_us: hop.record(stopped=by_us),
        flag=checked.flag,
    )
    rehearsal = Rehearsal(checked.connection, subject, options.step_timeout, hop.emit)
    try:
        if gained := await rehearsal.run():
            hop.note(gained)
    except Unrehearsable as err:
        if back.blocker:
            raise Refused(
                f"cannot rehearse the upgrade ({err}), and cannot roll back to the old emulator: {back.blocker}",
                "sevhop upgrade --no-rehearsal skips both; if it fails then, the guest stays suspended in the keeper",
            ) from err
        hop.note(f"not rehearsed: {err}")
        return False
    finally:
        hop.report.rehearsal_ms = rehearsal.downtime_ms
    return True


async def prepare(hop: Transaction, checked: CheckedDomain, keeper: KeeperClient, *, rehearsed: bool) -> PreparedDomain:
    """
    Have libvirt probe the new emulator, store the run-time settings, and give the source a file to save to.

    :param rehearsed: whether the processors of both emulators were compared.
    :raises SevhopError: the domain was changed, or libvirt or QEMU refuses.
    """
    described = domain_xml.describe(checked.xml)
    await checked.connection.probe_capabilities(checked.new, described.arch, described.machine, described.kind)
    piped = emulator.probe(checked.new).needs_pipe
    displays = domain_xml.ports(await checked.domain.live_xml())
    settings = await runtime_settings.read(checked.monitor, checked.source)
    words = None if rehearsed else await cpu_features.feature_words(checked.monitor)
    saved_settings.save(keeper.directory, reboot.settings_after_hop(checked.guest, settings), words)
    if note := cgroup_memory.unaccounted(checked.source):
        hop.note(note)
    state = await hop.resources.enter_async_context(SavedDeviceState(checked.monitor, checked.guest.machine_type))
    await state.arm()
    disks = await DiskGuard.open(checked.monitor, checked.source)
    hop.resources.callback(disks.close)
    # The keeper has the disks as they were when the domain was examined, and compares the destination's with these.
    if found := comparison.changes(checked.disks, disks.graph):
        raise SevhopError(f"another client has changed the domain: {found}", "try again")
    flag = protected_state.open_flag(hop, checked.source, checked.flag)
    return PreparedDomain(piped, displays, disks, state, flag)
