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

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sevhop_qmp.errors import SevhopError
from sevhop_qmp.move import MoveReport
from sevhop_qmp.process import QemuProcess

from ..errors import GuestState, RecoveryRequired, Refused
from ..events import Event, HopFinished, Listener
from ..keeper.client import KeeperClient
from ..libvirt import domain_xml
from ..libvirt.daemon import DomainTimeout
from ..options import HopOptions, UpgradeOptions
from ..records import run_directory
from ..records.hop_record import Process
from ..report import Phase, Report
from . import fixed_taps
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


@dataclass(frozen=True)
class FirstHop:
    """
    The hop into the transit.

    :ivar guard: the directory by which the hook finds the transit until a keeper has it: whoever destroys the domain,
        which does not answer then, must not start it again beside its guest.
    """

    hop: TransitHop
    guard: Path


def first_hop(hop: Transaction, options: UpgradeOptions, checked: CheckedDomain) -> FirstHop:
    """
    The hop into the transit. Its events are those of the upgrade, and so is its record.

    :raises SevhopError: another hop of the domain is in progress.
    """
    guard = run_directory.claim(checked.domain.name, checked.domain.uuid)
    hop.rollback.push(lambda: run_directory.remove(checked.domain.name, guard))
    hop.record(directory=str(guard), xml=checked.xml)
    subject = TransitSource(
        checked.connection, checked.domain, checked.source, checked.disks, checked.xml, checked.new, checked.flag
    )
    hop_options = HopOptions(step_timeout=options.step_timeout, move_deadline=options.move_deadline)
    return FirstHop(TransitHop(subject, hop_options, _listener(hop), _recorder(hop, guard)), guard)


def _recorder(hop: Transaction, guard: Path) -> Callable[..., None]:
    def record(**fields: Any) -> None:
        if isinstance(transit := fields.get("destination"), Process):
            run_directory.note_transit(guard, f"{transit.pid} {transit.started}")
        hop.record(**recorded(fields))

    return record


def _listener(hop: Transaction) -> Listener:
    def forward(event: Event) -> None:
        if not isinstance(event, HopFinished):
            hop.emit(event)

    return forward


async def enter_transit(hop: Transaction, checked: CheckedDomain, first: FirstHop) -> bool:
    """
    Have the guest hop into the transit.

    :return: False if a transit cannot carry this domain; nothing was touched.
    :raises HopError: see :meth:`.transaction.Transaction.run`.
    """
    report, reason = first.hop.report, ""
    try:
        await first.hop.run()
    except Refused as err:
        if not isinstance(err.__cause__, Untransitable):
            raise
        reason = err.message
    except RecoveryRequired:
        # The guest may be in the transit. For sevhop recover all stays: the guard, and a program for the way back.
        hop.rollback.clear()
        raise
    finally:
        _add_phases(hop.report, report)
        hop.report.notes += report.notes
        hop.report.move = report.move
        _add_downtime(hop, report.downtime_ms)
    if reason:
        run_directory.remove(checked.domain.name, first.guard)
        hop.record(directory="")
        hop.note(f"not by way of a transit: {reason}")
        return False
    hop.commit(GuestState.IN_TRANSIT)
    return True


def _add_phases(upgrade: Report, hop: Report) -> None:
    """Each once: the hop checks again what the upgrade has checked."""
    took = {phase.name: phase.ms for phase in upgrade.phases}
    for phase in hop.phases:
        took[phase.name] = took.get(phase.name, 0.0) + phase.ms
    upgrade.phases = [Phase(name, ms) for name, ms in took.items()]


def _add_downtime(hop: Transaction, downtime: float | None) -> None:
    """One of the two pauses; None or 0 if the guest was paused before."""
    if downtime:
        hop.report.downtimes_ms.append(downtime)
        hop.report.downtime_ms = max(hop.report.downtimes_ms)


async def keep(
    hop: Transaction, options: UpgradeOptions, checked: CheckedDomain, back: WayBack, first: FirstHop
) -> KeptDomain:
    """
    Have a keeper take the transit.

    :raises SevhopError: it cannot; the guest runs in the transit.
    """
    there = first.hop.transit
    assert there is not None
    process = QemuProcess.open(there.process.pid)
    hop.resources.callback(process.close)
    directory = there.directory
    await there.leave()
    with contextlib.suppress(SevhopError):  # the daemon may have been restarted
        await checked.domain.reconnect()
    domain = checked.domain
    xml, displays = checked.xml, list[dict[str, str]]()
    try:
        displays = domain_xml.ports(await domain.live_xml())
        xml = await _latest_xml(checked)
    except DomainTimeout as err:
        # A daemon that was restarted waits for the old QEMU, which is halted, until that has ended (seen with 11.3).
        hop.note(f"what others have changed in the hop is lost, and ports of displays may be others: {err.message}")
    hop.record(xml=xml, stopped_ms=hop.report.stopped_ms or 0.0)
    transit = InTransit(
        checked.connection.uri,
        domain.name,
        domain.uuid,
        xml,
        back.emulator,
        checked.new,
        process,
        directory / "monitor",
        directory,
        there.cgroups,
        there.apparmor_profile,
        first.hop.settings,
        displays,
        step_timeout=options.step_timeout,
        move_deadline=options.move_deadline,
    )
    keeper = await take_into_keeper(transit)
    hop.resources.callback(keeper.close)
    hop.record(directory=str(keeper.directory), transit=Process.of(process))
    return KeptDomain(transit, keeper)


async def _latest_xml(checked: CheckedDomain) -> str:
    """The domain as it ran: others may have changed it until now. If it is off, libvirt knows only its definition."""
    xml = domain_xml.without_additions(await checked.domain.xml())
    return xml if await checked.domain.active() else checked.xml


async def leave_libvirt(
    hop: Transaction, options: UpgradeOptions, checked: CheckedDomain, transit: QemuProcess
) -> None:
    """
    End the old QEMU, have libvirt see that, and leave it the names of the taps.

    :raises SevhopError: it does not; the guest runs in the transit.
    """
    await retire(checked.domain, checked.source, options.step_timeout)
    for name, other in fixed_taps.rename(checked.xml, transit).items():
        hop.note(f"tap {name} is called {other} while the guest is in the transit; rules for {name} do not apply to it")


async def restore(hop: Transaction, checked: CheckedDomain, kept: KeptDomain) -> Restored:
    """
    Have libvirt start the destination, and the guest hop into it; then the persistent definition gets its emulator.

    :raises GuestLost: it has been switched off in the transit.
    :raises RecoveryRequired: it still runs in the transit.
    """
    try:
        restored = await restore_from_transit(checked.connection, kept.transit, kept.keeper)
    except RecoveryRequired as err:
        hop.record(failure=str(err).replace("\0", ""))  # for sevhop status
        raise
    status = restored.status
    hop.report.destination_pid, hop.report.destination_version = status["destination"], status["version"]
    if status["move"] is not None:
        hop.report.move = MoveReport(**status["move"])
    _add_downtime(hop, status["downtime_ms"])
    for note in restored.notes:
        hop.note(note)
    return restored
