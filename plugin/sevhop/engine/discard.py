"""
Give up the guest of an interrupted hop: the way out when it can neither be finished nor rolled back.

======================================  =====================================================================
the guest runs in the transit           that is terminated, as by a power failure
it is suspended in the keeper           the keeper exits, and with it the guest's memory is gone
the same, and the keeper hangs          it is killed, and so is its supervisor
nobody has it                           only what the hop has left is removed
libvirt has a QEMU of the domain        refused: that is not ours to give up
its old QEMU is there                   refused, unless the guest has left it for the transit
======================================  =====================================================================

If the journal is damaged, all that is decided by what is found of the hop otherwise (:mod:`.damaged_hop`):

======================================  =====================================================================
libvirt has the only QEMU of a domain   that stays: the guest is nowhere else
another QEMU of the domain is there     refused, unless it is the transit, and the only one
the guest is outside libvirt            no QEMU is touched, only the journal is removed
======================================  =====================================================================

Then the journal, the image, and all other traces of the hop are removed, so that libvirt may start the domain from its
disks.
"""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import shutil
import time
from pathlib import Path

from sevhop_qmp.errors import SevhopError
from sevhop_qmp.pidfd_process import PidfdProcess

from ..errors import GuestState, RecoveryRequired, Refused
from ..keeper.client import KeeperClient
from ..keeper.config import KeeperError, KeeperTimeout
from ..keeper.listeners import listening_at
from ..keeper.paths import KeeperPaths
from ..keeper.state import State
from ..keeper.transit_state import TransitState
from ..libvirt.connection import Connection
from ..records import journal, run_directory
from ..records.hop_record import NO_PROCESS, HopRecord, uptime
from ..records.journal import Journal, JournalError
from . import damaged_hop, recovery, way_back
from .damaged_hop import DamagedHop
from .recovery_result import Loss, RecoveredGuest, RecoveryOutcome
from .suspended_guest import readable
from .transit import remove_confinement

_POLL = 0.05
#: The guest gets no chance to write what it has in its memory.
_AS_POWER = "as by a power failure: what it has not written to its disks is lost"
_REMAINS = "only what the hop has left in the journal and in /run/sevhop is removed"
_MAY_START = "libvirt may start the domain from its disks"
#: Where the guest of a hop with a damaged journal is that is not given up.
_IN_DOMAIN, _OUTSIDE = "domain", "outside"
_DONE = {_IN_DOMAIN: "only its hop: the guest stays in libvirt's QEMU", _OUTSIDE: "only its hop: no QEMU was touched"}


async def assess(name: str, *, timeout: float) -> Loss:
    """
    What would be lost. Nothing is touched.

    :param name: of the domain, or its UUID.
    :param timeout: seconds for each answer.
    :raises Refused: a hop of it is in progress, or its guest is where libvirt sees it.
    """
    path, record = await _interrupted(name)
    if journal.in_progress(path):
        who = "another process" if record is None else f"process {record.command}"
        raise Refused(f"{who} is hopping {name if record is None else record.guest}, or recovers it", "wait for it")
    return await (_assess_damaged(damaged_hop.examine(path), timeout) if record is None else _assess(record, timeout))


async def discard(expected: Loss, *, timeout: float) -> RecoveredGuest:
    """
    Give up a guest.

    :param expected: from :func:`assess`, to which somebody has agreed.
    :param timeout: seconds for each step.
    :raises Refused: it is somewhere else now; nothing was touched.
    :raises RecoveryRequired: its process does not exit.
    """
    path, record = await _interrupted(expected.guest)
    damaged = damaged_hop.examine(path) if record is None else None
    try:
        mine = Journal.take_over(path) if damaged is None else Journal.take_over_unreadable(path, damaged.record)
    except SevhopError as err:
        raise Refused(err.message, err.hint) from err
    try:
        record = mine.record
        found = await (_assess(record, timeout) if damaged is None else _assess_damaged(damaged, timeout))
        if found.state != expected.state:
            raise Refused(f"the guest is not where it was any more: {found.text}", "decide again")
        if found.state not in (_IN_DOMAIN, _OUTSIDE):
            await _give_up(record, found, timeout)
        elif found.state == _IN_DOMAIN:
            await _release_held(record, timeout)
    except BaseException:
        mine.leave()
        raise
    mine.end()
    if damaged is not None:
        recovery.sweep()
    return RecoveredGuest(record.guest, RecoveryOutcome.DISCARDED, _DONE.get(found.state, _MAY_START))


async def _interrupted(name: str) -> tuple[Path, HopRecord | None]:
    """
    The journal of a hop, and what is in it; None if it is damaged.

    :raises Refused: there is no such hop.
    """
    for path in journal.journals():
        try:
            record = journal.read(path)
        except JournalError:
            continue
        if name not in (record.guest, record.uuid):
            continue
        if record.kind != "domain":
            hint = f"terminate its QEMU (process {record.source.pid}), then run: sevhop recover {shlex.quote(name)}"
            raise Refused(f"{name} is no domain", hint)
        return path, record
    if (found := await damaged_hop.find(name)) is not None:
        return found, None
    raise Refused(f"no hop of {name} was interrupted", "see: sevhop status")


async def _assess_damaged(found: DamagedHop, timeout: float) -> Loss:
    """:raises Refused: it is not known which QEMU has the guest."""
    record, others = found.record, found.others
    if record.kind != "domain":
        old = f"the old one (process {record.source.pid})"
        where = f"{old}, or one that the hop has started" if record.source.exists else f"a new one: {old} has exited"
        where = "the one that is there" if record.source == NO_PROCESS else where
        return Loss(record.guest, _OUTSIDE, f"only the journal is removed; the guest stays in its QEMU: {where}")
    if not await _has_qemu(record, timeout):
        if others:
            raise Refused(
                f"process {others[0]} is a QEMU of the domain, which libvirt does not have; it may have the guest",
                "terminate it if it has not, or the guest is to be given up; then this again",
            )
        return await _assess(record, timeout)
    directory = _directory(record)
    serves = directory is not None and run_directory.alive(directory)
    state = await _state_of_keeper(directory, timeout) if directory is not None and serves else State.HELD.value
    if record.transit is not None or len(others) != 1 or state not in (State.HELD.value, ""):
        elsewhere = [f"process {record.transit.pid}, the transit"] if record.transit is not None else []
        elsewhere += ["the keeper"] if serves and record.transit is None else []
        pids = [f"process {pid}" for pid in others]
        raise Refused(
            f"libvirt has a QEMU of the domain, and any of these may have the guest: {'; '.join(pids + elsewhere)}",
            "find out which has it, and terminate the others; then this again",
        )
    text = f"the guest is in libvirt's QEMU (process {others[0]}), which stays as it is"
    return Loss(record.guest, _IN_DOMAIN, f"{text}, perhaps paused; {_REMAINS}")


async def _assess(record: HopRecord, timeout: float) -> Loss:
    """:raises Refused: the guest is where libvirt sees it, or may be."""
    if not record.this_boot:
        return Loss(record.guest, "nowhere", f"the host was rebooted, and the guest is gone; {_REMAINS}")
    transit = record.transit if record.transit is not None and record.transit.exists else None
    await _verify_libvirt_has_none(record, timeout)
    if record.source.exists and not (record.committed and transit is not None):
        raise Refused(
            f"its old QEMU (process {record.source.pid}) is there, and may have the guest",
            f"run: sevhop recover {shlex.quote(record.guest)}",
        )
    if transit is not None:
        text = f"the guest runs in the transit (process {transit.pid}), which is terminated, {_AS_POWER}"
        return Loss(record.guest, "transit", text)
    directory = _directory(record)
    state = ""
    if directory is not None and run_directory.alive(directory):
        try:
            state = await _state_of_keeper(directory, timeout)
        except KeeperTimeout:
            text = f"the guest may be suspended in the keeper, which does not reply and is killed, {_AS_POWER}"
            return Loss(record.guest, "hanging-keeper", text)
    if state and state not in (State.OVER.value, State.LOST.value, TransitState.ENDED.value):
        since = f"for {readable(uptime() - record.stopped_at)}" if record.stopped_at else "in the hop"
        text = f"the guest is suspended in the keeper, {since}: it is ended {_AS_POWER}"
        return Loss(record.guest, "keeper", text)
    return Loss(record.guest, "nowhere", f"neither a QEMU nor a keeper has the guest; {_REMAINS}")


async def _has_qemu(record: HopRecord, timeout: float) -> bool:
    """
    Whether libvirt has a QEMU of the domain.

    :raises Refused: it does not answer.
    """
    try:
        connection = await Connection.open(record.uri, timeout)
        try:
            domain = await connection.domain_with(record.uuid)
            return domain is not None and await domain.active()
        finally:
            connection.close()
    except SevhopError as err:
        raise Refused(f"whether libvirt has the guest is not known: {err.message}", err.hint) from err


async def _verify_libvirt_has_none(record: HopRecord, timeout: float) -> None:
    """:raises Refused: libvirt has a QEMU of the domain, or does not answer."""
    name = shlex.quote(record.guest)
    if await _has_qemu(record, timeout):
        raise Refused(
            f"libvirt has a QEMU of domain {record.guest}, which may have the guest",
            f"run: sevhop recover {name}; to give up that QEMU: virsh destroy {name}, then this again",
        )


def _directory(record: HopRecord) -> Path | None:
    """Of the keeper."""
    found = run_directory.hop_with(record.uuid)
    if found.is_dir():
        return found
    return Path(record.directory) if record.directory else run_directory.hop_of(record.guest)


async def _state_of_keeper(directory: Path, timeout: float) -> str:
    """
    Empty if it has just exited.

    :raises KeeperTimeout: it does not reply.
    """
    try:
        keeper = await KeeperClient.connect(directory)
    except KeeperError:
        return ""
    keeper.timeout = timeout
    try:
        return str((await keeper.status())["state"])
    except KeeperTimeout:
        raise
    except KeeperError:
        return ""
    finally:
        keeper.close()


async def _give_up(record: HopRecord, loss: Loss, timeout: float) -> None:
    """:raises SevhopError: a process does not exit."""
    directory = _directory(record)
    # If the old QEMU is there, it is halted: the guest has left it.
    for one in (record.transit, record.source) if record.this_boot else ():
        if one is not None and (process := one.open()) is not None:
            with contextlib.closing(process):
                await _kill(process, timeout)
    if directory is not None and run_directory.alive(directory):
        hangs = loss.state == "hanging-keeper"
        if not hangs:
            await _release(directory, timeout)
        await _end_keeper(directory, 0.0 if hangs else timeout, timeout)
    if record.transit_directory:
        shutil.rmtree(record.transit_directory, ignore_errors=True)
    await remove_confinement(record.cgroups, record.apparmor_profile)
    if directory is not None:
        run_directory.remove(record.guest, directory)
    await way_back.forget_unused_at(record.uri, record.uuid)


async def _release_held(record: HopRecord, timeout: float) -> None:
    """Have a keeper exit that has only duplicates of what the source has."""
    directory = _directory(record)
    if directory is not None and run_directory.alive(directory):
        await _release(directory, timeout)
        await _end_keeper(directory, timeout, timeout)


async def _kill(process: PidfdProcess, timeout: float) -> None:
    """:raises RecoveryRequired: it does not exit."""
    process.kill()
    if not await process.wait(timeout):
        raise RecoveryRequired(
            f"process {process.pid} was killed, and does not exit: it waits in the kernel, usually for storage",
            "restore that, then run this again",
            GuestState.UNKNOWN,
        )


async def _release(directory: Path, timeout: float) -> None:
    """Have a keeper exit. One whose transit was killed notices that first."""
    try:
        keeper = await KeeperClient.connect(directory)
    except KeeperError:
        return
    keeper.timeout = timeout
    try:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            status = await keeper.status()
            if "transit" not in status or status["state"] == TransitState.ENDED.value:
                await keeper.release()
                return
            await asyncio.sleep(_POLL)
    except KeeperError:
        return  # what is left is killed
    finally:
        keeper.close()


async def _end_keeper(directory: Path, patience: float, timeout: float) -> None:
    """
    Wait until a keeper has exited. It is killed if it does not, and its supervisor before it.

    :param patience: seconds until then.
    :raises RecoveryRequired: it still exists.
    """
    deadline = time.monotonic() + patience
    processes = await asyncio.to_thread(listening_at, KeeperPaths(directory).control)
    try:
        while any(process.alive for process in processes) and time.monotonic() < deadline:
            await asyncio.sleep(_POLL)
        for process in processes:
            await _kill(process, timeout)
    finally:
        for process in processes:
            process.close()
