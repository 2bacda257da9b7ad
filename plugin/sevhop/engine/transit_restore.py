"""
The domain whose guest runs in the transit becomes libvirt's again: the last phases of an upgrade by way of a transit.

::

    keep       a keeper process has the transit, and refuses other starts of the domain
    restore    libvirt starts the destination from an image without a state; when it has accepted that, the guest hops
               from the transit into it (:mod:`sevhop.engine.second_hop`, in the keeper)
    define     the persistent definition gets the emulator

If the restore fails, it is tried with the old emulator; if that fails as well, the guest stays in the transit, where it
runs all the time, and ``sevhop recover`` or ``virsh restore`` of the image finishes it.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sevhop_qmp import adopt_library, selinux
from sevhop_qmp.errors import SevhopError
from sevhop_qmp.monitor import Monitor
from sevhop_qmp.process import QemuProcess

from ..disks import block_graph
from ..errors import GuestLost, GuestState, RecoveryRequired
from ..guest import inspection, reboot, saved_settings
from ..guest.inspection import ENCRYPTED_BLOCKS
from ..guest.kept_path import original
from ..keeper.client import KeeperClient
from ..keeper.config import KeeperConfig, TransitConfig
from ..keeper.transit_state import FINISHED, TransitState
from ..libvirt import domain_xml, hook
from ..libvirt.connection import Connection
from ..libvirt.daemon import DomainError, DomainTimeout
from ..libvirt.save_image import SaveImage
from .destination import MONITOR
from .upgrade_restore import define_emulator, end_hanging_destination, not_defined
from .upgrade_save import resume_hint

#: Seconds between two polls of the keeper.
_POLL = 0.01
#: Seconds until libvirt has given up what others have begun, such as a destination that has exited; more if a step may
#: take more.
_CLEAN_UP = 30.0


@dataclass(frozen=True)
class InTransit:
    """
    A domain whose guest runs in the transit.

    :ivar uri: of the daemon.
    :ivar name, uuid: of the domain.
    :ivar xml: of the domain as it ran, without what earlier hops have added.
    :ivar old, new: the emulator that it ran in, and the one to upgrade to.
    :ivar process: the transit.
    :ivar monitor: path of its QMP socket, to which no client is connected.
    :ivar directory: its own, which is removed with it.
    :ivar cgroups: directories of the cgroups that were made for it.
    :ivar apparmor_profile: name of the profile that was loaded for it; empty without one.
    :ivar settings: made at run time; see :mod:`sevhop.guest.saved_settings`.
    :ivar displays: the ports that libvirt had chosen for the displays.
    :ivar only_new: the old emulator is not tried.
    :ivar step_timeout: seconds for each step of the hop, and for libvirt to accept the destination.
    :ivar move_deadline: seconds for which a busy move of the SEV context is retried.
    """

    uri: str
    name: str
    uuid: str
    xml: str
    old: str
    new: str
    process: QemuProcess
    monitor: Path
    directory: Path
    cgroups: tuple[str, ...] = ()
    apparmor_profile: str = ""
    settings: str = ""
    displays: Sequence[dict[str, str]] = ()
    only_new: bool = False
    step_timeout: float = KeeperConfig.step_timeout
    move_deadline: float = KeeperConfig.move_deadline


def recorded(fields: Mapping[str, Any]) -> dict[str, Any]:
    """
    What a hop into a transit records of its destination, as the journal of a domain has it.

    :param fields: of :class:`sevhop.records.hop_record.HopRecord`, as that hop has them.
    """
    found = dict(fields)
    if "destination" in found:
        directory = found.pop("directory")
        found |= {"transit": found.pop("destination"), "transit_directory": directory}
        found["transit_monitor"] = str(Path(directory) / MONITOR)
    return found


async def take_into_keeper(transit: InTransit) -> KeeperClient:
    """
    Start a keeper that has the transit, and write the image. From then on the domain may be restored.

    :raises SevhopError: that is not possible; the guest runs in the transit.
    """
    process = transit.process
    async with await Monitor.connect(transit.monitor, timeout=transit.step_timeout) as monitor:
        guest = await inspection.inspect(monitor, process)
        graph = await block_graph.read(monitor)
    identity, described = process.credentials, domain_xml.describe(transit.xml)
    config = KeeperConfig(
        name=transit.name,
        uuid=transit.uuid,
        uri=transit.uri,
        pid=process.pid,
        uid=identity.uid,
        gid=identity.gid,
        emulator=transit.new,
        context=guest.context,
        blocks=tuple(guest.blocks.values()),
        encrypted=() if guest.context.kind == "none" else tuple(ENCRYPTED_BLOCKS),
        stops_at_reboot=reboot.stops(guest),
        disks=graph,
        move_deadline=transit.move_deadline,
        step_timeout=transit.step_timeout,
        transit=TransitConfig(
            str(transit.monitor),
            str(transit.directory),
            transit.cgroups,
            transit.apparmor_profile,
            described.on_poweroff,
            described.on_reboot,
            described.on_crash,
            transit.settings,
        ),
    )
    keeper = await KeeperClient.start(config)
    try:
        write_image(transit, keeper)
    except BaseException:
        keeper.close()
        raise
    return keeper


def write_image(transit: InTransit, keeper: KeeperClient) -> None:
    """
    Write what libvirt restores.

    :raises SevhopError: it cannot be written.
    """
    environment = adopt_library.environment(keeper.socket) | {hook.IMAGE_MARK: "without RAM"}
    monitor = str(keeper.monitor)
    label = selinux.context_in(transit.process.confinement)
    xml = domain_xml.for_destination(transit.xml, transit.new, environment, monitor, transit.displays, label)
    try:
        with open(keeper.image, "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            # libvirt lets also a paused guest run: only then it reports that it has finished.
            SaveImage(xml, True, b"").write(file)
    except OSError as err:
        keeper.image.unlink(missing_ok=True)
        raise SevhopError(f"cannot write the save image: {err.strerror}", "free space in /run, then try again") from err


@dataclass(frozen=True)
class Restored:
    """
    The guest is libvirt's again.

    :ivar emulator: that it is in.
    :ivar failure: why it is not in the new one; empty if it is.
    :ivar status: of the keeper.
    :ivar notes: what is not as it was, or could not be done; none of it matters to the guest.
    """

    emulator: str
    failure: str
    status: dict[str, Any]
    notes: list[str]


async def restore_from_transit(connection: Connection, transit: InTransit, keeper: KeeperClient) -> Restored:
    """
    Have libvirt restore the domain, and wait until the guest has hopped into it; in the old emulator if the new one
    fails. Then finish the rest (:func:`complete`).

    :raises GuestLost: the guest has been switched off in the transit.
    :raises RecoveryRequired: the guest still runs in the transit.
    """
    failures: dict[str, str] = {}
    patience = max(_CLEAN_UP, transit.step_timeout)
    for emulator in dict.fromkeys((transit.new,) if transit.only_new else (transit.new, transit.old)):
        try:
            status = await keeper.status()
            if TransitState(status["state"]) is TransitState.OVER:  # the last attempt has succeeded after all
                emulator = str(status["emulator"])
                failures.clear()
            else:
                await keeper.use(emulator)
                status = await _restore(connection, transit, keeper, patience)
        except GuestLost:
            raise
        except SevhopError as err:
            failures[emulator] = err.message
            # A libvirt that is busy with the first attempt, because a hook does not return, has no time for another.
            patience = transit.step_timeout
        else:
            notes = await complete(connection, transit.name, transit.uuid, transit.old, keeper)
            return Restored(emulator, _reasons(failures), status, [*filter(None, [status["note"]]), *notes])
    raise RecoveryRequired(
        f"libvirt cannot restore the domain: {_reasons(failures)}",
        resume_hint(transit.name, keeper),
        GuestState.IN_TRANSIT,
    )


def _reasons(failures: Mapping[str, str]) -> str:
    """Why the domain could not be restored in some emulators; what they have in common is there once."""
    if len(failures) > 1 and len(set(failures.values())) == 1:
        return f"{' and '.join(failures)}: {next(iter(failures.values()))}"
    return "; ".join(f"{emulator}: {reason}" for emulator, reason in failures.items())


async def complete(connection: Connection, name: str, uuid: str, old: str, keeper: KeeperClient | None) -> list[str]:
    """
    The guest is libvirt's again: carry over what is left of its settings, give the persistent definition the emulator,
    and release the keeper. Nothing here can hurt the guest.

    :param name, uuid: of the domain.
    :param old: the emulator before the upgrade.
    :return: notes.
    """
    notes: list[str] = []
    try:
        domain = await connection.domain_with(uuid)
        if domain is not None:
            if keeper is not None:
                notes += await saved_settings.finish(keeper.directory, await domain.monitor(), domain.pid())
            emulator = original(domain_xml.describe(await domain.xml()).emulator)
            notes.append(await define_emulator(connection, uuid, old, emulator))
    except (SevhopError, domain_xml.DomainXmlError) as err:
        notes.append(not_defined(name, err))
    if keeper is not None:
        await keeper.release()
    return list(filter(None, notes))


async def _restore(connection: Connection, transit: InTransit, keeper: KeeperClient, patience: float) -> dict[str, Any]:
    """
    One attempt.

    :param patience: seconds until a restore that was begun before must be over.
    :return: the keeper's status afterwards.
    :raises SevhopError: it has failed, and the guest runs in the transit.
    """
    # A restore that somebody else has begun, or that has failed, is over before.
    await _until_inactive(connection, transit, keeper, patience)
    failure: DomainError | None = None
    try:
        await connection.restore(str(keeper.image), timeout=transit.step_timeout)
    except DomainTimeout as err:
        if not await end_hanging_destination(connection, transit.uuid, keeper):
            reason = f"the new QEMU does not run within {transit.step_timeout:g} s, and was ended"
            raise SevhopError(reason, "see its log in /var/log/libvirt/qemu; raise --timeout on a slow host") from err
    except DomainError as err:
        failure = err
        await connection.reconnect()
    deadline = time.monotonic() + 4 * transit.step_timeout
    while True:
        status = await keeper.status()
        state = TransitState(status["state"])
        if state is TransitState.OVER:
            return status
        if state in FINISHED:
            raise GuestLost(status["reason"], "start the domain" if not status["note"] else status["note"])
        if state is TransitState.TRANSIT:
            # Why libvirt has ended the new QEMU only libvirt knows; the keeper may know more about one that has failed.
            reasons = [status["reason"], failure.message if failure else ""]
            raise SevhopError("; ".join(filter(None, reasons)) or "the new QEMU has exited")
        if state is TransitState.RESTORING and failure is not None and not await _active(connection, transit.uuid):
            # Nothing has come of it, and nothing will.
            await keeper.revoke()
            reason = (await keeper.status())["reason"]
            raise SevhopError(failure.message or reason) from failure
        if time.monotonic() > deadline:
            await keeper.revoke()
            raise SevhopError(f"the guest has not hopped within {4 * transit.step_timeout:g} s")
        await asyncio.sleep(_POLL)


async def _until_inactive(connection: Connection, transit: InTransit, keeper: KeeperClient, patience: float) -> None:
    """
    Wait until the domain is off, or the keeper has finished.

    :raises SevhopError: it stays active.
    """
    deadline = time.monotonic() + patience
    while TransitState((await keeper.status())["state"]) not in FINISHED and await _active(connection, transit.uuid):
        if time.monotonic() > deadline:
            raise SevhopError("the domain is still active in libvirt", "see virsh list")
        await asyncio.sleep(_POLL)


async def _active(connection: Connection, uuid: str) -> bool:
    domain = await connection.domain_with(uuid)
    return domain is not None and await domain.active()
