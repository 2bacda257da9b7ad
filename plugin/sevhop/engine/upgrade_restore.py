"""
The phases of an upgrade after the old QEMU has exited: restore and define. The guest is suspended in the keeper, whose
hook commits when libvirt has loaded the device state.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

from sevhop_qmp import move
from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import QemuProcess

from ..disks import block_graph
from ..errors import GuestLost
from ..events import MoveAttempted
from ..guest import saved_settings
from ..guest.kept_path import original
from ..keeper.client import KeeperClient
from ..keeper.config import KeeperError, KeeperTimeout
from ..keeper.state import State
from ..libvirt import domain_xml
from ..libvirt.connection import Connection
from ..libvirt.daemon import NO_DOMAIN, DomainError, DomainTimeout
from ..libvirt.definition import redefine
from ..libvirt.domain import Domain
from ..report import Phase
from . import way_back
from .transaction import Transaction
from .upgrade_prepare import CheckedDomain, PreparedDomain
from .upgrade_save import StoppedDomain

#: Seconds between two polls of a restore by another client.
_POLL = 0.05


async def restore(
    hop: Transaction,
    checked: CheckedDomain,
    keeper: KeeperClient,
    prepared: PreparedDomain,
    stopped: StoppedDomain,
) -> None:
    """
    Have libvirt start the destination from the image.

    :raises GuestLost: the guest ran there, and the destination has exited.
    :raises SevhopError: it did not start, and cannot any more; the guest is suspended in the keeper.
    """
    try:
        await start_destination(checked.connection, checked.domain.uuid, keeper)
    except DomainError as err:
        if not await _arrived_all_the_same(hop, checked, keeper, stopped):
            reason = (await keeper.status())["reason"]
            raise SevhopError(reason or err.message) from err
    hop.downtime_ends()
    await _report_destination(hop, checked, keeper)
    if not stopped.was_running:
        await _activate(hop, checked)
    if prepared.disks.graph.bitmaps():
        with contextlib.suppress(SevhopError):
            for text in await prepared.disks.lost_bitmaps(await checked.domain.monitor()):
                hop.note(text)


async def start_destination(connection: Connection, uuid: str, keeper: KeeperClient) -> None:
    """
    Have libvirt restore the domain from the image. A destination that does not run in time is ended.

    :param uuid: of the domain.
    :raises DomainError: it did not start.
    :raises SevhopError: it does not start, and either cannot be ended, or that is not known.
    """
    try:
        await connection.restore(str(keeper.image))
    except DomainTimeout as err:
        if not await end_hanging_destination(connection, uuid, keeper):
            reason = f"the new QEMU does not run within {connection.timeout:g} s, and was ended"
            raise SevhopError(reason, "see its log in /var/log/libvirt/qemu; raise --timeout on a slow host") from err


async def end_hanging_destination(connection: Connection, uuid: str, keeper: KeeperClient) -> bool:
    """
    End a destination that libvirt has started and that does not run in time.

    :return: whether it has the guest after all, and is left alone.
    :raises SevhopError: it cannot be ended, or that is not known.
    """
    deadline = time.monotonic() + keeper.timeout
    while True:
        try:
            await keeper.revoke()
            break
        except KeeperTimeout:
            raise
        except KeeperError:
            # It has the guest, or the keeper is committing, which ends.
            if (await keeper.status())["state"] == State.OVER.value:
                return True
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(_POLL)
    domain = await connection.domain_with(uuid)
    if domain is not None:
        pid = None
        with contextlib.suppress(DomainError):  # there is no pid file yet, or no more
            pid = _destination_pid(domain, keeper)
        # The keeper kills one that it has seen; another one has been started from the image all the same.
        with contextlib.suppress(SevhopError):
            if pid is not None:
                process = QemuProcess.open(pid)
                process.kill()
                process.close()
        await domain.destroy()
    return False


def _destination_pid(domain: Domain, keeper: KeeperClient) -> int | None:
    """
    The pid of the QEMU that libvirt has started from the image; None if it has exited.

    :raises DomainError: it cannot be found.
    :raises SevhopError: the domain has another QEMU.
    """
    pid = domain.living_pid()
    # One that exits meanwhile has no environment any more, and no command line.
    if pid is None or keeper.has_started(pid) or domain.living_pid() != pid:
        return pid
    raise SevhopError(f"process {pid} runs domain {domain.name}, and was not started by this hop")


async def _activate(hop: Transaction, checked: CheckedDomain) -> None:
    """A QEMU that is restored paused has not activated its images (10.0), and would not until it is resumed."""
    try:
        await block_graph.activate(await checked.domain.monitor())
    except SevhopError as err:
        hop.note(f"the disks of the paused guest are activated when it is resumed, not now: {err.message}")


async def _arrived_all_the_same(
    hop: Transaction, checked: CheckedDomain, keeper: KeeperClient, stopped: StoppedDomain
) -> bool:
    """
    Whether the guest is in the destination although libvirt reports a failure: the daemon may have been killed after
    the commit, or another client has restored our image. If not, there is no destination any more.

    :raises GuestLost: the guest was in the destination, which has exited.
    :raises SevhopError: that is not known.
    """
    domain = checked.domain
    try:
        if not await domain.reconnect():
            return await _restored_by_another(checked, keeper)
    except DomainError as err:
        if err.code == NO_DOMAIN:
            return await _restored_by_another(checked, keeper)
        raise
    if (await keeper.status())["state"] in (State.COMMITTED.value, State.OVER.value):
        with contextlib.suppress(SevhopError):
            # It answers when libvirt has reconnected to its domains.
            if not (await checked.monitor.execute("query-status"))["running"] and stopped.was_running:
                await domain.resume()
            return True
    if await domain.active():
        _destination_pid(domain, keeper)
    try:
        await keeper.revoke()
    except KeeperError as err:
        hop.note(f"libvirt cannot connect to the new QEMU, but {err.message}")
        return True
    # It has not run the guest, and cannot any more.
    await domain.destroy()
    return False


async def _restored_by_another(checked: CheckedDomain, keeper: KeeperClient) -> bool:
    """Whether another client's restore of our image succeeds; one in progress is waited for."""
    domain = checked.domain
    deadline = time.monotonic() + keeper.timeout
    while time.monotonic() < deadline:
        active = await domain.active()
        status = await keeper.status()
        if status["state"] == State.OVER.value:
            return True
        if status["state"] == State.LOST.value:
            raise GuestLost(f"{status['reason']}, which has exited")
        # A destination that exited after the commit: the keeper is about to find out whether the guest had run there.
        if not active and status["state"] != State.COMMITTED.value:
            return False
        await asyncio.sleep(_POLL)
    if await end_hanging_destination(checked.connection, checked.domain.uuid, keeper):
        return True
    raise SevhopError(f"another client's restore of the domain was still in progress after {keeper.timeout:g} s")


async def _report_destination(hop: Transaction, checked: CheckedDomain, keeper: KeeperClient) -> None:
    """Report what the keeper has seen of the destination."""
    try:
        status = await keeper.status()
    except KeeperError as err:
        # Without it the hook would have refused, and the restore would have failed.
        hop.note(f"the guest runs in the new QEMU, of which nothing is known: {err.message}")
        return
    if status["state"] not in (State.COMMITTED.value, State.OVER.value):
        if status["reason"]:
            raise SevhopError(status["reason"])
        raise SevhopError("libvirt restored the domain without calling the hook of sevhop", "run: sevhop install")
    hop.report.destination_pid = status["destination"]
    hop.report.destination_version = status["version"]
    if status["move"]:
        hop.report.move = move.MoveReport(**status["move"])
        hop.emit(MoveAttempted(hop.named, hop.report.move.attempts, hop.report.move.errno))
    hop.report.phases += [
        Phase("restore: until the hook", status["until_started_ms"]),
        Phase("restore: commit", status["commit_ms"]),
    ]
    notes = await saved_settings.finish(keeper.directory, checked.monitor, status["destination"])
    for note in filter(None, [*notes, status["note"]]):
        hop.note(note)


async def define(hop: Transaction, checked: CheckedDomain, keeper: KeeperClient) -> None:
    """Give the persistent definition the new emulator, and release the keeper. Nothing here can hurt the guest."""
    connection, uuid = checked.connection, checked.domain.uuid
    try:
        note = await define_emulator(connection, uuid, checked.old, checked.new)
    except (SevhopError, domain_xml.DomainXmlError) as err:
        note = not_defined(checked.domain.name, err)
    if note:
        hop.note(note)
    # A guest that was paused stays so; its QEMU has everything, and the keeper is not needed.
    await keeper.release()
    await way_back.forget_unused(connection, uuid)


def not_defined(name: str, error: Exception) -> str:
    """The note that the persistent definition could not be changed."""
    return f"the persistent definition still has the old emulator: {error}; change it with: virsh edit {name}"


async def define_emulator(connection: Connection, uuid: str, old: str, new: str) -> str:
    """
    Set the emulator of a domain's persistent definition, if it has one, and that has the old emulator. Another one is
    what somebody wants for the next start.

    :return: a note if it has another one; otherwise empty.
    :raises DomainError: libvirt refuses, also once more if the daemon was restarted meanwhile.
    """
    try:
        return await _define_emulator(connection, uuid, old, new)
    except DomainError:
        if not await connection.reconnect():
            raise
        return await _define_emulator(connection, uuid, old, new)


async def _define_emulator(connection: Connection, uuid: str, old: str, new: str) -> str:
    domain = await connection.domain_with(uuid)
    if domain is None or not await domain.persistent():
        return ""
    kept = ""

    async def change(xml: str) -> str:
        nonlocal kept
        has = domain_xml.describe(xml).emulator
        # The one that a guest was rolled back to is not in the definition.
        kept = "" if has in (old, original(old), new) else has
        return domain_xml.with_emulator(xml, new) if has in (old, original(old)) and has != new else xml

    await redefine(connection, domain, change)
    return f"the persistent definition keeps its own emulator, {kept}" if kept else ""
