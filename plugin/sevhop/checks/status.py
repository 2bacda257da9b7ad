"""Finds out the status of domains (:mod:`sevhop.checks.domain_status`)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace

from sevhop_qmp.errors import SevhopError

from ..guest import kept_emulator
from ..guest.emulator import probe
from ..keeper.client import KeeperClient
from ..libvirt.connection import Connection
from ..libvirt.domain import Domain
from ..records import back_off, journal
from ..records.journal import JournalError
from ..records.run_directory import alive, hop_of, hops_in_progress
from .domain import examine
from .domain_status import DomainStatus, Place


async def survey(uri: str, names: Sequence[str], emulator: str | None = None) -> list[DomainStatus]:
    """
    The status of domains.

    :param names: of domains; all that are active, or have a hop in progress, when there are none.
    :param emulator: the QEMU to go to; by default each domain's own, as it is on disk now.
    :raises SevhopError: libvirt does not answer, or has no such domain.
    """
    connection = await Connection.open(uri)
    try:
        hopping = {name for name in names or hops_in_progress() if hop_of(name) is not None}
        # libvirt is busy with a domain during its hop, and does not know a transient one while its guest is suspended.
        # When the hop was interrupted, the domain may have a QEMU again.
        suspended = {name for name in hopping if _has_keeper(name)}
        active = await connection.domains()
        if names:
            domains = [await connection.look_up(name) for name in names if name not in hopping]
            domains += [domain for domain in active if domain.name in hopping - suspended]
        else:
            domains = [domain for domain in active if domain.name not in suspended]
        rows = [await _status(connection, domain, emulator) for domain in domains]
        without = hopping - {domain.name for domain in domains}
        rows += [DomainStatus(name, operation=await _operation(name)) for name in without]
        rows += [] if names else _of_damaged_journals()
        return sorted(map(_with_place, rows), key=lambda row: row.name)
    finally:
        connection.close()


def _of_damaged_journals() -> list[DomainStatus]:
    """Hops of which nobody knows the guest, by the names of their journals, as ``recover`` reports them."""
    rows = []
    for path in journal.journals():
        try:
            journal.read(path)
        except JournalError as err:
            if path.exists():  # its hop has not just ended
                rows.append(DomainStatus(path.name, operation=str(err), attended=False))
    return rows


def _has_keeper(name: str) -> bool:
    directory = hop_of(name)
    return directory is not None and alive(directory)


async def _status(connection: Connection, domain: Domain, emulator: str | None) -> DomainStatus:
    operation = await _operation(domain.name)
    try:
        async with examine(connection, domain, emulator) as examined:
            failures = examined.tree.failures()
            restart = examined.tree.restart_failure()
            try:
                installed_version = probe(examined.new).version
            except SevhopError:
                installed_version = ""
            return DomainStatus(
                domain.name,
                running_version=examined.monitor.version,
                binary_state=kept_emulator.on_disk(examined.process, examined.old).value,
                installed_version=installed_version,
                operation=operation,
                blocker=failures[0].reason if failures else "",
                restart_required=restart.reason if restart is not None else "",
                hint=(restart or failures[0]).hint if failures else "",
            )
    except SevhopError as err:
        return DomainStatus(domain.name, operation=operation, blocker=str(err))


def _with_place(row: DomainStatus) -> DomainStatus:
    """With what the journal, and the processes that it names, say of the guest."""
    for path in journal.journals():
        try:
            record = journal.read(path)
        except JournalError:
            continue
        if record.kind != "domain" or record.guest != row.name or not record.this_boot:
            continue
        attended = journal.in_progress(path)
        if record.failures and not attended:
            again = f"the last recovery failed: {record.failure}; {back_off.next_attempt(record)}"
            row = replace(row, operation="; ".join(filter(None, [row.operation, again])))
        if record.committed and record.transit is not None and record.transit.exists:
            return replace(row, place=Place.TRANSIT, attended=attended, elsewhere_s=record.transit.age)
        suspended = record.transit is None and not record.source.exists and _has_keeper(row.name)
        return replace(row, place=Place.KEEPER if suspended else Place.DOMAIN, attended=attended)
    return row


def _left_in_transit(name: str) -> str:
    """A guest whose transit has no keeper any more; empty if there is none."""
    for path in journal.journals():
        with contextlib.suppress(JournalError):
            record = journal.read(path)
            if record.guest == name and record.transit is not None and record.transit.exists:
                where = f"the guest runs in the transit (process {record.transit.pid})"
                return f"{where}, without a keeper; run: sevhop recover"
    return ""


async def _operation(name: str) -> str:
    directory = hop_of(name)
    if directory is None:
        return ""
    try:
        keeper = await KeeperClient.connect(directory)
    except SevhopError:
        return _left_in_transit(name) or "hop interrupted: its keeper is gone"
    try:
        status = await keeper.status()
        if status.get("transit"):
            running = f"the guest runs in the transit (QEMU {status['transit_version']}, process {status['transit']})"
            failed = f"; the last restore failed: {status['reason']}" if status["reason"] else ""
            return (
                f"{running}: {status['state']}{failed}; to finish: sevhop recover, or virsh restore {status['image']}"
            )
        return f"hop in progress: {status['state']}, image {status['image']}"
    finally:
        keeper.close()
