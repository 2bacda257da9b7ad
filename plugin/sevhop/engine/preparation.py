"""
``sevhop prepare``: the persistent definitions of domains are changed so that their guests can hop when they are started
the next time. The running domains stay as they are, and so do their guests.
"""

from __future__ import annotations

import contextlib
import difflib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from xml.etree import ElementTree

from sevhop_qmp.errors import SevhopError

from ..checks import definition
from ..checks.domain import devices, examine
from ..checks.result import Status
from ..errors import Refused
from ..libvirt import prepared_xml
from ..libvirt.connection import Connection
from ..libvirt.daemon import NO_DOMAIN, DomainError
from ..libvirt.definition import redefine
from ..libvirt.domain import Domain
from ..records import journal
from ..records.run_directory import hop_of
from .exclusion import is_excluded
from .preparation_result import Preparations, PreparedDefinition

_ACPI = "without <features><acpi/></features> libvirt 9.0 cannot start it in QEMU 9 or later"


async def prepare(
    uri: str, names: Sequence[str] | None, *, exclude: Sequence[str] = (), dry_run: bool = False
) -> Preparations:
    """
    Prepare domains. One that is refused does not keep the others from it.

    :param names: names, UUIDs or ids, all of which are looked up first; None for all that are defined.
    :param exclude: patterns of names (:mod:`fnmatch`) to leave out of all; a domain may opt out as well.
    :param dry_run: change nothing.
    :raises SevhopError: there is no such domain, or libvirt does not answer; nothing was touched.
    """
    connection = await Connection.open(uri)
    try:
        if names is None:
            domains, excluded = await _defined(connection, exclude)
        else:
            found = [await connection.look_up(name) for name in names]
            domains, excluded = list({domain.uuid: domain for domain in found}.values()), list[str]()
        done = [await _prepared(connection, domain, dry_run) for domain in domains]
        return Preparations(tuple(done), tuple(excluded))
    finally:
        connection.close()


async def _defined(connection: Connection, exclude: Sequence[str]) -> tuple[list[Domain], list[str]]:
    """All domains that have a definition, by name; and the names of those that are left out."""
    domains, excluded = [], []
    for domain in sorted(await connection.all_domains(), key=lambda one: one.name):
        try:
            if not await domain.persistent():
                continue
            if await is_excluded(domain.name, domain, exclude, defined=True):
                excluded.append(domain.name)
            else:
                domains.append(domain)
        except DomainError as err:
            if err.code != NO_DOMAIN:  # otherwise it is gone meanwhile
                raise
    return domains, excluded


async def _prepared(connection: Connection, domain: Domain, dry_run: bool) -> PreparedDefinition:
    try:
        return await _prepare(connection, domain, dry_run)
    except SevhopError as err:
        active = False
        with contextlib.suppress(SevhopError):
            active = await domain.active()
        return PreparedDefinition(domain.name, "refused", active=active, reason=err.message, hint=err.hint)


async def _prepare(connection: Connection, domain: Domain, dry_run: bool) -> PreparedDefinition:
    if not await domain.persistent():
        raise Refused(
            f"domain {domain.name} is transient: it has no definition that could be changed",
            f"add {prepared_xml.MEMORY_BACKING} to the XML that it is created from",
        )
    if hop_of(domain.name) is not None:
        journal.expect_none(domain.uuid)  # it knows which one, and whether that waits for somebody
        raise Refused(f"a hop of domain {domain.name} is in progress", "wait for it to end; see sevhop status")
    now = await _running(connection, domain)
    made = PreparedDefinition(domain.name, "unchanged", active=now.active, restart_required=now.reason, notes=now.notes)

    async def change(xml: str) -> str:
        nonlocal made
        lacking = await definition.examine(connection, xml, now.machine)
        if not lacking.prepared.changes:
            if made.outcome == "unchanged":
                made = replace(made, notes=(*now.notes, *lacking.notes, *_notes(xml)))
            return xml
        shown = await domain.inactive_xml(secure=False)
        made = replace(
            made,
            outcome="checked" if dry_run else "done",
            changes=lacking.prepared.changes,
            diff=_diff(domain.name, shown, prepared_xml.prepare(shown, lacking.wanted).xml),
            notes=(*now.notes, *lacking.notes, *_notes(xml)),
        )
        return xml if dry_run else lacking.prepared.xml

    await redefine(connection, domain, change)
    return replace(made, hint=_hint(made))


def _hint(made: PreparedDefinition) -> str:
    name = shlex.quote(made.domain)
    start = f"virsh shutdown {name}, and when it is off virsh start {name}"
    if made.outcome == "checked":
        return f"run: sevhop prepare {name}" + (f"; then {start}" if made.restart_required else "")
    return start if made.restart_required else ""


@dataclass(frozen=True)
class _Running:
    """
    A domain's guest, as it is now.

    :ivar machine: its machine type.
    :ivar reason: why it cannot hop until it was started again.
    :ivar notes: if that could not be found out.
    """

    active: bool = False
    machine: str = ""
    reason: str = ""
    notes: tuple[str, ...] = ()


async def _running(connection: Connection, domain: Domain) -> _Running:
    if not await domain.active():
        if await domain.managed_save():
            remove = f"virsh managedsave-remove {shlex.quote(domain.name)}"
            return _Running(notes=(f"the next start resumes its saved state, with the memory as it was: {remove}",))
        return _Running()
    try:
        async with examine(connection, domain) as examined:
            failure = examined.tree.restart_failure()
            return _Running(True, examined.guest.machine_type, failure.reason if failure is not None else "")
    except SevhopError as err:
        return _Running(True, notes=(f"whether it can hop now is not known: {err.message}",))


def _notes(xml: str) -> list[str]:
    """What the guest cannot hop with, and whoever uses it must decide about."""
    found = []
    if (result := devices(xml)).status is Status.FAIL:
        found.append(f"it cannot hop with these devices: {result.detail}")
    if ElementTree.fromstring(xml).find("features/acpi") is None:
        found.append(_ACPI)
    return found


def _diff(name: str, before: str, after: str) -> str:
    lines = (before.splitlines(), after.splitlines())
    return "\n".join(difflib.unified_diff(*lines, f"{name}, as defined", f"{name}, prepared", lineterm="")) + "\n"
