"""
A hop whose journal is damaged, or of another version: what can be found of it otherwise, so that it can be given up.

Its journal has the UUID of the domain in its name, or the old QEMU outside libvirt. A QEMU has its domain's UUID on its
command line, a transit listens in a directory of ours, and the keeper has a link that is named like the UUID.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import QemuProcess

from ..keeper.listeners import listening_at
from ..process import apparmor_profile, machine_cgroup
from ..records import journal, run_directory
from ..records.hop_record import NO_PROCESS, HopRecord, Process
from .destination import MONITOR

_OF_DOMAIN = re.compile(r"domain-(?P<uuid>[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})\.journal")
_OF_PROCESS = re.compile(r"process-(?P<pid>[0-9]{1,9})-(?P<started>[0-9]{1,18})\.journal")
#: As :class:`sevhop.process.apparmor_profile.ProfileCopy` names them.
_PROFILE_COPY = re.compile(r"libvirt-[0-9a-f-]{36}-[0-9a-f]{8}")
_URI = "qemu:///system"


@dataclass(frozen=True)
class DamagedHop:
    """
    What was found.

    :ivar record: of a domain with its transit, if that is there; outside libvirt with its source. What is not known has
        its default, and the guest is called like the journal.
    :ivar others: QEMUs of the domain that are no transit: one is libvirt's, if that has one.
    """

    record: HopRecord
    others: tuple[int, ...] = ()


async def find(name: str) -> Path | None:
    """
    The damaged journal of a guest; None if there is none.

    :param name: of the journal, as ``status`` and ``recover`` report it; or name or UUID of a domain.
    :raises JournalError: it is unknown which journals there are.
    """
    damaged = {path: _uuid(path) for path in journal.journals() if journal.is_unreadable(path)}
    for path, uuid in damaged.items():
        if name == path.name or (uuid and name.lower() == uuid):
            return path
    wanted = await _uuid_of(name) if any(damaged.values()) else ""
    return next((path for path, uuid in damaged.items() if wanted and uuid == wanted), None)


def examine(path: Path) -> DamagedHop:
    """
    What can be found of it now.

    :param path: of its journal.
    :raises SevhopError: a process has just exited.
    """
    record = HopRecord("standalone", path.name, "none", True, NO_PROCESS)
    if (match := _OF_PROCESS.fullmatch(path.name)) and int(match["pid"]):
        return DamagedHop(replace(record, source=Process(int(match["pid"]), int(match["started"]))))
    if not (uuid := _uuid(path)):
        return DamagedHop(record)
    record = replace(record, kind="domain", uuid=uuid, uri=_URI, committed=True)
    others = []
    for pid in _qemus(uuid):
        directory = _directory_of_transit(pid)
        if directory is None or record.transit is not None:
            others.append(pid)
            continue
        with contextlib.closing(QemuProcess.open(pid)) as process:
            record = replace(
                record,
                transit=Process.of(process),
                transit_directory=str(directory),
                cgroups=machine_cgroup.of_transit(process),
                apparmor_profile=_profile(process),
            )
    return DamagedHop(record, tuple(others))


def _uuid(path: Path) -> str:
    """Of its domain; empty if it is not that of a domain."""
    match = _OF_DOMAIN.fullmatch(path.name)
    return match["uuid"] if match else ""


async def _uuid_of(name: str) -> str:
    """Of a domain; empty if there is none, or libvirt does not answer."""
    if "/" in name or importlib.util.find_spec("libvirt") is None:
        return ""
    if (directory := run_directory.hop_of(name)) is not None:
        # libvirt does not know a transient domain now.
        for link in run_directory.entries(run_directory.RUN):
            uuid = link.removeprefix(run_directory.UUID_LINK)
            if uuid != link and run_directory.hop_with(uuid) == directory.resolve():
                return uuid
    return await _uuid_of_domain(name)


async def _uuid_of_domain(name: str) -> str:
    """As libvirt knows it."""
    # It is only needed here, and is optional.
    from ..libvirt.connection import Connection

    with contextlib.suppress(SevhopError):
        connection = await Connection.open(_URI)
        try:
            return (await connection.look_up(name)).uuid.lower()
        finally:
            connection.close()
    return ""


def _qemus(uuid: str) -> list[int]:
    """The QEMUs in our network namespace, as the daemon is, that run a domain with this UUID."""
    network = os.readlink("/proc/self/ns/net")
    found = []
    for name in sorted(filter(str.isdigit, os.listdir("/proc")), key=int):
        with contextlib.suppress(OSError):
            words = Path("/proc", name, "cmdline").read_bytes().split(b"\0")
            of_domain = (b"-uuid", uuid.encode()) in itertools.pairwise(words)
            if of_domain and os.readlink(f"/proc/{name}/ns/net") == network:
                found.append(int(name))
    return found


def _directory_of_transit(pid: int) -> Path | None:
    """Where a QEMU listens as a transit does; None if it is none."""
    for name in run_directory.entries(run_directory.RUN):
        directory = run_directory.RUN / name
        if directory.is_symlink() or not (directory / MONITOR).is_socket():
            continue
        listening = listening_at(directory / MONITOR)
        for process in listening:
            process.close()
        if pid in [process.pid for process in listening]:
            return directory
    return None


def _profile(process: QemuProcess) -> str:
    """Name of the profile that was loaded for a transit; empty if there is none."""
    label = apparmor_profile.label(process.confinement)
    return label.profile if label is not None and _PROFILE_COPY.fullmatch(label.profile) else ""
