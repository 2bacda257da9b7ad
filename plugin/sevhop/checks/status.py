"""Finds out the status of domains (:mod:`sevhop.checks.domain_status`)."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from sevhop_qmp.errors import SevhopError

from ..guest import kept_emulator
from ..guest.emulator import probe
from ..keeper.client import KeeperClient
from ..keeper.paths import KeeperPaths
from ..keeper.state import State
from ..keeper.transit_state import RESTORE_ENDED, TransitState
from ..libvirt.connection import Connection
from ..libvirt.domain import Domain
from ..process import systemd
from ..records import back_off, journal
from ..records.hop_record import PREPARED, HopRecord, uptime
from ..records.journal import JournalError
from ..records.run_directory import alive, hop_of, hop_with, hops_in_progress
from .domain import examine
from .domain_status import DomainStatus, Place


async def survey(uri: str, names: Sequence[str], emulator: str | None = None) -> list[DomainStatus]:
    """
    The status of domains.

    :param names: of domains, or of guests outside libvirt that have a hop, in progress or interrupted; all of these,
        and all active domains, when there are none.
    :param emulator: the QEMU to go to; by default each domain's own, as it is on disk now.
    :raises SevhopError: libvirt does not answer, or has no such domain.
    """
    connection = await Connection.open(uri)
    try:
        recorded = {record.guest for _, record in _journals()}
        asked = names or {*hops_in_progress(), *recorded}
        hopping = {name for name in asked if hop_of(name) is not None or name in recorded}
        # libvirt is busy with a domain during its hop, and does not know a transient one while its guest is suspended.
        # When the hop was interrupted, the domain may have a QEMU again.
        suspended = {name for name in hopping if _has_keeper(name)}
        active = await connection.domains()
        outside = _outside_libvirt(names)
        if names:
            known = hopping | ({row.name for row in outside} - {domain.name for domain in active})
            domains = [await connection.look_up(name) for name in dict.fromkeys(names) if name not in known]
            domains += [domain for domain in active if domain.name in hopping - suspended]
        else:
            domains = [domain for domain in active if domain.name not in suspended]
        rows = [await _status(connection, domain, emulator) for domain in domains]
        without = hopping - {domain.name for domain in domains}
        rows += [DomainStatus(name, operation=await _operation(name)) for name in without]
        rows += [] if names else _of_damaged_journals()
        return sorted([*map(_with_place, rows), *outside], key=lambda row: row.name)
    finally:
        connection.close()


def _outside_libvirt(names: Sequence[str]) -> list[DomainStatus]:
    """Guests outside libvirt that have a hop: with such a name, or all."""
    rows = []
    for path, record in _journals("standalone"):
        if names and record.guest not in names:
            continue
        row = DomainStatus(record.guest, place=Place.OUTSIDE)
        if journal.in_progress(path):
            rows.append(replace(row, operation="hop in progress"))
        elif path.exists():  # it has not just ended
            rows.append(_unattended(row, record))
    return rows


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
    found = _journal_of(row.name)
    if found is None:
        return row
    path, record = found
    attended = journal.in_progress(path)
    if not record.this_boot:  # what it names is of others now
        return row if attended else _unattended(row, record)
    in_transit = record.committed and record.transit is not None and record.transit.exists
    suspended = not in_transit and record.transit is None and not record.source.exists and _has_keeper(row.name)
    if in_transit and record.transit is not None:
        row = replace(row, place=Place.TRANSIT, elsewhere_s=record.transit.age)
    elif suspended:
        row = replace(row, place=Place.KEEPER, elsewhere_s=uptime() - (record.stopped_at or record.began))
    return row if attended else _unattended(row, record)


def _unattended(row: DomainStatus, record: HopRecord) -> DomainStatus:
    """No command is at work on the hop: what has failed, and what is to be done."""
    operation = [row.operation or _not_finished(row, record)]
    arrived = row.running_version and record.transit is not None and not record.transit.exists
    if record.failure and not arrived:
        operation.append(f"the last attempt failed: {record.failure}")
        # One that waits on purpose is not tried unasked, and without systemd there is no timer that would.
        if record.failures and record.phase != PREPARED and systemd.manages_host():
            operation.append(back_off.next_attempt(record))
    hint = f"run: sevhop recover {shlex.quote(row.name)}"
    if row.place in (Place.TRANSIT, Place.KEEPER) and (image := KeeperPaths(hop_with(record.uuid)).image).exists():
        hint += f", or virsh restore {image}"
    return replace(row, operation="; ".join(operation), hint=hint, attended=False)


def _not_finished(row: DomainStatus, record: HopRecord) -> str:
    """What is known of a hop that has no keeper."""
    if not record.this_boot:
        return "the host was rebooted during its hop"
    if record.transit is not None and not record.transit.exists and not row.running_version:
        return "the transit has exited, in which the guest was"
    return f'hop not finished (phase "{record.phase or "acquire"}")'


def _journals(kind: str = "domain") -> Iterator[tuple[Path, HopRecord]]:
    """Of the hops of such guests, in progress or not, as far as they can be read."""
    for path in journal.journals():
        with contextlib.suppress(JournalError):
            if (record := journal.read(path)).kind == kind:
                yield path, record


def _journal_of(name: str) -> tuple[Path, HopRecord] | None:
    """Of the hop of a domain, if there is one."""
    return next(((path, record) for path, record in _journals() if record.guest == name), None)


async def _operation(name: str) -> str:
    directory = hop_of(name)
    if directory is None:
        return ""
    _, record = _journal_of(name) or (None, None)
    try:
        keeper = await KeeperClient.connect(directory)
    except SevhopError:
        if record is not None and record.transit is not None and record.transit.exists:
            return f"the guest runs in the transit (process {record.transit.pid}), without a keeper"
        return "hop interrupted: its keeper is gone"
    try:
        status = await keeper.status()
        if not status.get("transit"):
            waits = status["state"] in (State.WAITING.value, State.RESTORING.value)
            what = "the guest is suspended in the keeper" if waits else "hop in progress"
            return f"{what}: {status['state']}, image {status['image']}"
        if status["state"] == TransitState.ENDED.value:
            return f"the guest is off: {status['reason']}"
        running = f"the guest runs in the transit (QEMU {status['transit_version']}, process {status['transit']})"
        if status["state"] != TransitState.TRANSIT.value:
            running += f": {status['state']}"
        # Of a restore that a command has ended, the command has recorded why.
        reason, failure = status["reason"], "" if record is None else record.failure
        known = failure and (reason == RESTORE_ENDED or reason in failure)
        return f"{running}; the last restore failed: {reason}" if reason and not known else running
    finally:
        keeper.close()
