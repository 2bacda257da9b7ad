"""
The phases of an upgrade by way of a transit: two hops with libvirt's restart between them.

::

    check ... finish   the guest hops into a QEMU beside libvirt (:mod:`sevhop.engine.transit_hop`)
    keep               a keeper has that transit, and the hook refuses other starts of the domain
    retire             the old QEMU exits, and libvirt sees the domain shut off
    restore            libvirt starts the destination; when it has accepted that, the guest hops into it
                       (:mod:`sevhop.engine.second_hop`, in the keeper). The persistent definition gets its emulator

Before the first hop's commit everything is rolled back to the old QEMU. After it the guest runs in the transit,
whatever libvirt, its hooks or the destination do, until it hops again.
"""

from __future__ import annotations

from dataclasses import dataclass

from sevhop_qmp.process import QemuProcess

from ..errors import GuestState, Refused
from ..events import Event, HopFinished, Listener
from ..guest import reboot, saved_settings
from ..keeper.client import KeeperClient
from ..libvirt import domain_xml
from ..options import HopOptions, UpgradeOptions
from ..records.hop_record import Process
from .retire import retire
from .transaction import Transaction
from .transit_command_line import Untransitable
from .transit_hop import TransitHop, TransitSource
from .transit_restore import InTransit, Restored, recorded, restore_from_transit, take_into_keeper
from .upgrade_prepare import CheckedDomain
from .way_back import WayBack


@dataclass(frozen=True)
class KeptDomain:
    """A domain whose guest runs in the transit, and the keeper that has it."""

    transit: InTransit
    keeper: KeeperClient


def first_hop(hop: Transaction, options: UpgradeOptions, checked: CheckedDomain) -> TransitHop:
    """The hop into the transit. Its events are those of the upgrade, and so is its record."""
    subject = TransitSource(
        checked.connection, checked.domain, checked.source, checked.disks, checked.xml, checked.new, checked.flag
    )
    hop_options = HopOptions(step_timeout=options.step_timeout, move_deadline=options.move_deadline)
    return TransitHop(subject, hop_options, _listener(hop), lambda **fields: hop.record(**recorded(fields)))


def _listener(hop: Transaction) -> Listener:
    def forward(event: Event) -> None:
        if not isinstance(event, HopFinished):
            hop.emit(event)

    return forward


async def enter_transit(hop: Transaction, first: TransitHop) -> bool:
    """
    Have the guest hop into the transit.

    :return: False if a transit cannot carry this domain; nothing was touched.
    :raises HopError: see :meth:`.transaction.Transaction.run`.
    """
    try:
        await first.run()
    except Refused as err:
        if isinstance(err.__cause__, Untransitable):
            hop.note(f"not by way of a transit: {err.message}")
            return False
        raise
    finally:
        hop.report.phases += first.report.phases
        hop.report.notes += first.report.notes
    hop.commit(GuestState.IN_TRANSIT)
    _add_downtime(hop, first.report.downtime_ms)
    return True


def _add_downtime(hop: Transaction, downtime: float | None) -> None:
    """One of the two pauses; None or 0 if the guest was paused before."""
    if downtime:
        hop.report.downtimes_ms.append(downtime)
        hop.report.downtime_ms = max(hop.report.downtimes_ms)


async def keep(
    hop: Transaction, options: UpgradeOptions, checked: CheckedDomain, back: WayBack, first: TransitHop
) -> KeptDomain:
    """
    Have a keeper take the transit.

    :raises SevhopError: it cannot; the guest runs in the transit.
    """
    assert first.transit is not None
    process = QemuProcess.open(first.transit.process.pid)
    hop.resources.callback(process.close)
    directory = first.transit.directory
    await first.transit.leave()
    displays = domain_xml.ports(await checked.domain.live_xml())
    domain = checked.domain
    transit = InTransit(
        checked.connection.uri,
        domain.name,
        domain.uuid,
        checked.xml,
        back.emulator,
        checked.new,
        process,
        directory / "monitor",
        directory,
        first.transit.cgroups,
        displays,
        options.step_timeout,
    )
    keeper = await take_into_keeper(transit)
    hop.resources.callback(keeper.close)
    hop.record(directory=str(keeper.directory), transit=Process.of(process))
    if first.settings is not None:
        settings = reboot.settings_after_hop(checked.guest, first.settings)
        saved_settings.save(keeper.directory, settings, None)
    return KeptDomain(transit, keeper)


async def leave_libvirt(options: UpgradeOptions, checked: CheckedDomain) -> None:
    """
    End the old QEMU, and have libvirt see that.

    :raises SevhopError: it does not; the guest runs in the transit.
    """
    await retire(checked.domain, checked.source, options.step_timeout)


async def restore(hop: Transaction, checked: CheckedDomain, kept: KeptDomain) -> Restored:
    """
    Have libvirt start the destination, and the guest hop into it; then the persistent definition gets its emulator.

    :raises GuestLost: it has been switched off in the transit.
    :raises RecoveryRequired: it still runs in the transit.
    """
    restored = await restore_from_transit(checked.connection, kept.transit, kept.keeper)
    status = restored.status
    hop.report.destination_pid, hop.report.destination_version = status["destination"], status["version"]
    _add_downtime(hop, status["downtime_ms"])
    for note in restored.notes:
        hop.note(note)
    return restored
