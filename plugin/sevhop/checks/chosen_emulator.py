"""
Can the guest of an interrupted hop be restored in this emulator? Whoever recovers the hop has chosen it, when those do
not start that the hop has recorded. The tests are those of an upgrade to it, as far as they are about the emulator.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import QemuProcess

from ..cancellation import shielded
from ..errors import Refused
from ..guest import emulator, kept_path
from ..libvirt import domain_xml
from ..libvirt.connection import Connection
from ..libvirt.save_image import SaveImage, SaveImageError
from ..records.hop_record import HopRecord
from . import guest as guest_checks
from .restart import processor
from .result import CheckResult, failed, passed

_WITHOUT = "recover it without --emulator"
_ANOTHER = "name another one with --emulator, or recover without it"


async def verify_for_transit(record: HopRecord, connection: Connection, chosen: str) -> None:
    """
    Nothing is touched.

    :param chosen: path of the emulator to restore the domain in, whose guest runs in the transit.
    :raises Refused: that is not possible, or there is no guest to be restored.
    """
    process = record.transit.open() if record.transit else None
    if process is None:
        raise Refused("the guest is not in the transit any more", _WITHOUT)
    try:
        await _verify(connection, record.xml, record.old, chosen, process)
    finally:
        process.close()


async def verify_for_image(record: HopRecord, connection: Connection, image: Path, chosen: str) -> None:
    """
    Nothing is touched.

    :param image: of the domain, whose guest is suspended in the keeper.
    :param chosen: path of the emulator to restore it in.
    :raises Refused: that is not possible.
    """
    try:
        with open(image, "rb") as file:
            saved = SaveImage.read(file)
        xml = domain_xml.without_additions(saved.xml)
    except (OSError, SaveImageError, domain_xml.DomainXmlError) as err:
        raise Refused(f"cannot read the save image {image}: {err}") from err
    await _verify(connection, xml, record.old, chosen, None)
    new = emulator.probe(chosen)
    if new.needs_pipe and not saved.piped:
        raise Refused(f"cannot restore the domain in {chosen}: QEMU {new.version} reads no state from a file", _ANOTHER)


async def _verify(connection: Connection, xml: str, old: str, chosen: str, process: QemuProcess | None) -> None:
    """
    :param xml: of the domain as it ran.
    :param old: the emulator that it ran in.
    :param chosen: path of the one to restore it in.
    :param process: the QEMU that has the guest now; None if it is suspended in the keeper.
    :raises Refused: it cannot be restored in that.
    """
    try:
        described = domain_xml.describe(xml)
        changed = domain_xml.with_emulator(xml, chosen)
        if kept_path.original(chosen) != chosen:
            raise SevhopError(f"{chosen} is kept for a rollback only", "name an emulator that is installed")
        results = await shielded(asyncio.to_thread(_emulator, chosen, described.machine, process))
        results.children.append(await processor(connection, xml, old, chosen))
        for found in results.failures():
            raise SevhopError(found.reason, found.hint)
        await connection.probe_capabilities(chosen, described.arch, described.machine, described.kind)
        await connection.command_line(domain_xml.without_interfaces(changed))
    except domain_xml.DomainXmlError as err:
        raise Refused(f"cannot restore the domain in {chosen}: {err}", _ANOTHER) from err
    except SevhopError as err:
        raise Refused(f"cannot restore the domain in {chosen}: {err.message}", err.hint or _ANOTHER) from err


def _emulator(chosen: str, machine: str, process: QemuProcess | None) -> CheckResult:
    if process is not None:
        readable = guest_checks.library(process)
        return passed("restart", "", guest_checks.emulator_for(chosen, machine, process, readable))
    found = emulator.probe(chosen)
    if machine not in found.machine_types:
        return passed("restart", "", failed("machine type", f"QEMU {found.version} has no {machine}", _ANOTHER))
    return passed("restart", "")
