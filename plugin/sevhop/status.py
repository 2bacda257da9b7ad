"""Where domains stand: which QEMU runs each, is another one installed, can it hop, is a hop under way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import OnDisk

from .domain import Connection, Domain
from .domain_check import examine
from .emulator import look
from .keeper_process import KeeperProcess
from .run_directory import alive, hop_of, hops_under_way


@dataclass(frozen=True)
class Standing:
    """
    Where a domain stands.

    :ivar running: the version that runs it; empty when no QEMU does, or it cannot be asked.
    :ivar binary: what has become of the file that it was started from: ``unchanged``, ``replaced`` or ``deleted``.
    :ivar installed: the version that its emulator has on disk now; empty when there is none.
    :ivar hop: how far a hop of it has come; empty when none is under way.
    :ivar obstacle: why it cannot hop; empty when it can.
    """

    name: str
    running: str = ""
    binary: str = ""
    installed: str = ""
    hop: str = ""
    obstacle: str = ""

    @property
    def outdated(self) -> bool:
        """Whether a hop to the emulator on disk would change something."""
        if not self.running or not self.installed:
            return False
        return self.running != self.installed or self.binary != OnDisk.UNCHANGED.value

    def as_json(self) -> dict[str, object]:
        """For ``--json``."""
        return asdict(self) | {"outdated": self.outdated}

    def __str__(self) -> str:
        if not self.running:
            if self.hop and not self.obstacle:
                return f"{self.name}: in a hop: {self.hop}"
            line = f"{self.name}: {self.obstacle or 'no QEMU'}"
        else:
            replaced = "" if self.binary == OnDisk.UNCHANGED.value else f" ({self.binary} on disk)"
            current = self.installed and not self.outdated
            disk = "up to date" if current else f"{self.installed or 'none'} is installed"
            able = f"cannot hop: {self.obstacle}" if self.obstacle else "can hop"
            line = f"{self.name}: QEMU {self.running}{replaced}, {disk}, {able}"
        return line + (f"; hop: {self.hop}" if self.hop else "")


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
