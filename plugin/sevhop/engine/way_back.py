"""
The way back of an upgrade: the emulator in which libvirt can restore the guest when the new one has failed, after the
old QEMU was terminated.

That is the emulator in the domain's XML as long as it leads to the program that runs. After a package update it leads
to another one; then the program is kept (:mod:`sevhop.guest.kept_emulator`) before the guest is stopped. A guest that
was rolled back runs in the kept one. That stays as long as libvirt has anything that names it, and while the domain is
off: its guest may have been saved to a file, which cannot be restored without that path.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass

from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import OnDisk, QemuProcess

from ..cancellation import shielded
from ..guest import emulator, kept_emulator, kept_path
from ..libvirt import domain_xml
from ..libvirt.connection import Connection
from ..records import journal
from .transaction import Transaction


@dataclass(frozen=True)
class WayBack:
    """
    Where a rollback restores the guest.

    :ivar emulator: its path.
    :ivar blocker: why the program of the old QEMU is not there, and cannot be kept; empty if it is.
    """

    emulator: str
    blocker: str = ""


async def prepare(hop: Transaction, connection: Connection, source: QemuProcess, xml: str, version: str) -> WayBack:
    """
    Find the way back, and keep the program of the source if there is none.

    :param xml: the domain as it runs.
    :param version: of the source.
    """
    described = domain_xml.describe(xml)
    old = described.emulator
    if not (reason := await shielded(asyncio.to_thread(_gone, source, old, version))):
        return WayBack(old)
    kept = kept_path.place(described.uuid, old)
    hop.record(kept=kept)
    hop.rollback.push(lambda: kept_emulator.forget(kept))
    try:
        await shielded(asyncio.to_thread(_keep, source, old, kept, version))
        # Also as QEMU's user, and so that this is not done while the guest is stopped. Then whether it has all devices.
        await connection.probe_capabilities(kept, described.arch, described.machine, described.kind)
        await connection.command_line(domain_xml.with_emulator(domain_xml.without_interfaces(xml), kept))
    except SevhopError as err:
        kept_emulator.forget(kept)
        hop.record(kept="")
        return WayBack(old, f"{reason}, and {err.message}")
    return WayBack(kept)


def _gone(source: QemuProcess, old: str, version: str) -> str:
    """Why an emulator does not lead to the program of the source; empty if it does."""
    was = source.on_disk
    if was is not OnDisk.UNCHANGED:
        return f"the QEMU that it runs in was {was.value} on disk"
    try:
        if os.path.samefile(old, f"/proc/{source.pid}/exe"):
            return ""
        # A link that was changed since, or a wrapper that runs QEMU.
        now = emulator.probe(old).version
    except (OSError, SevhopError) as err:
        return f"{old}: {getattr(err, 'strerror', None) or err}"
    return "" if now == version else f"{old} is QEMU {now} now"


def _keep(source: QemuProcess, old: str, kept: str, version: str) -> None:
    """:raises SevhopError: the program cannot be kept, or another one was started."""
    if source.command_line[0] != old:
        raise SevhopError(f"{old} was a program that runs QEMU")
    kept_emulator.keep(source, kept)
    if (found := emulator.probe(kept).version) != version:
        raise SevhopError(f"its program is QEMU {found}")


async def forget_unused(connection: Connection, finished: str = "") -> None:
    """
    Remove the programs that no domain needs any more, and no hop. If that is not known they stay.

    :param finished: UUID of a domain whose hop is over, although it has a journal yet.
    """
    # In this order: a hop has its journal before it keeps a program, and until its guest runs.
    directories = kept_emulator.directories()
    if not directories:
        return
    try:
        records = [journal.read(path) for path in journal.journals()]
        texts = [path for one in records if one.uuid != finished for path in (one.old, one.kept)]
        domains = await connection.all_domains()
        off = {domain.uuid.lower() for domain in domains if not await domain.active()}
        texts += [text for domain in domains for text in await domain.descriptions()]
    except SevhopError:
        return
    texts += kept_emulator.running()
    for directory in directories:
        if kept_path.domain(directory) not in off and not any(directory in text for text in texts):
            await asyncio.to_thread(kept_emulator.remove, directory)


async def forget_unused_at(uri: str, finished: str = "") -> None:
    """See :func:`forget_unused`; without a daemon all stay."""
    try:
        connection = await Connection.open(uri)
    except SevhopError:
        return
    try:
        await forget_unused(connection, finished)
    finally:
        connection.close()
