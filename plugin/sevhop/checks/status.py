"""Finds out where domains stand (:mod:`sevhop.checks.domain_status`)."""

from __future__ import annotations

from collections.abc import Sequence

from sevhop_qmp.errors import SevhopError

from ..guest.emulator import look
from ..keeper.client import KeeperProcess
from ..libvirt.connection import Connection, Domain
from ..records.run_directory import alive, hop_of, hops_under_way
from .domain import examine
from .domain_status import Standing


async def survey(uri: str, names: Sequence[str], emulator: str | None = None) -> list[Standing]:
    """
    Where domains stand.

    :param names: of domains; all that are active, or in a hop, when there are none.
    :param emulator: the QEMU to go to; by default each domain's own, as it is on disk now.
    :raises SevhopError: libvirt does not answer, or has no such domain.
    """
    connection = await Connection.open(uri)
    try:
        under_way = {name for name in names or hops_under_way() if hop_of(name) is not None}
        # libvirt is busy with a domain in a hop, and does not know a transient one while its guest is held. When the
        # hop was broken off, the domain may have a QEMU again.
        held = {name for name in under_way if _is_held(name)}
        active = await connection.domains()
        if names:
            domains = [await connection.domain(name) for name in names if name not in under_way]
            domains += [domain for domain in active if domain.name in under_way - held]
        else:
            domains = [domain for domain in active if domain.name not in held]
        rows = [await _standing(connection, domain, emulator) for domain in domains]
        without = under_way - {domain.name for domain in domains}
        rows += [Standing(name, hop=await _progress_of(name)) for name in without]
        return sorted(rows, key=lambda row: row.name)
    finally:
        connection.close()


def _is_held(name: str) -> bool:
    directory = hop_of(name)
    return directory is not None and alive(directory)


async def _standing(connection: Connection, domain: Domain, emulator: str | None) -> Standing:
    hop = await _progress_of(domain.name)
    try:
        async with examine(connection, domain, emulator) as examined:
            failures = examined.tree.failures()
            try:
                installed = look(examined.new).version
            except SevhopError:
                installed = ""
            return Standing(
                domain.name,
                running=examined.monitor.version,
                binary=examined.process.on_disk.value,
                installed=installed,
                hop=hop,
                obstacle=f"{failures[0].name}: {failures[0].detail}" if failures else "",
            )
    except SevhopError as err:
        return Standing(domain.name, hop=hop, obstacle=str(err))


async def _progress_of(name: str) -> str:
    directory = hop_of(name)
    if directory is None:
        return ""
    try:
        keeper = await KeeperProcess.connect(directory)
    except SevhopError:
        return "broken off: its keeper is gone"
    try:
        status = await keeper.status()
        return f"{status['state']}, image {status['image']}"
    finally:
        keeper.close()
