"""Where domains stand: which QEMU runs each, is another one installed, can it hop, is a hop under way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import path_on_disk

from . import emulator
from .domain import Connection, Domain
from .domain_check import examine
from .keeper_process import KeeperProcess
from .run_directory import hop_of, hops_under_way


@dataclass(frozen=True)
class Standing:
    """
    Where a domain stands.

    :ivar running: the version that runs it; empty when no QEMU does.
    :ivar installed: the version that its emulator has on disk now.
    :ivar replaced: whether the file that it was started from is not there any more.
    :ivar hop: how far a hop of it has come; empty when none is under way.
    :ivar obstacle: why it cannot hop; empty when it can.
    """

    name: str
    running: str = ""
    installed: str = ""
    replaced: bool = False
    hop: str = ""
    obstacle: str = ""

    @property
    def outdated(self) -> bool:
        """Whether a hop to the emulator on disk would change something."""
        return bool(self.running) and (self.replaced or self.running != self.installed)

    def as_json(self) -> dict[str, object]:
        """For ``--json``."""
        return asdict(self) | {"outdated": self.outdated}

    def __str__(self) -> str:
        if not self.running:
            return f"{self.name}: no QEMU; hop: {self.hop or 'none'}"
        line = f"{self.name}: QEMU {self.running}"
        line += f", {self.installed or 'none'} is installed" if self.outdated else ", up to date"
        line += f", cannot hop: {self.obstacle}" if self.obstacle else ", can hop"
        return line + (f"; hop: {self.hop}" if self.hop else "")


async def survey(uri: str, names: Sequence[str]) -> list[Standing]:
    """
    Where domains stand.

    :param names: of domains; all that are active, or in a hop, when there are none.
    :raises SevhopError: libvirt does not answer, or has no such domain.
    """
    connection = await Connection.open(uri)
    try:
        if names:
            domains = [await connection.domain(name) for name in names if hop_of(name) is None]
            held = [name for name in names if hop_of(name) is not None]
        else:
            held = hops_under_way()
            domains = [domain for domain in await connection.domains() if domain.name not in held]
        rows = [await _standing(connection, domain) for domain in domains]
        rows += [Standing(name, hop=await _progress_of(name)) for name in held]
        return sorted(rows, key=lambda row: row.name)
    finally:
        connection.close()


async def _standing(connection: Connection, domain: Domain) -> Standing:
    try:
        async with examine(connection, domain) as examined:
            failures = examined.tree.failures()
            try:
                installed = emulator.look(examined.new).version
            except SevhopError:
                installed = ""
            return Standing(
                domain.name,
                running=examined.monitor.version,
                installed=installed,
                replaced=path_on_disk(examined.process.executable) != examined.process.executable,
                obstacle=f"{failures[0].name}: {failures[0].detail}" if failures else "",
            )
    except SevhopError as err:
        return Standing(domain.name, obstacle=str(err))


async def _progress_of(name: str) -> str:
    directory = hop_of(name)
    try:
        if directory is None:
            return ""
        keeper = await KeeperProcess.connect(directory)
    except SevhopError:
        return "broken off: its keeper is gone"
    try:
        status = await keeper.status()
        return f"{status['state']}, image {status['image']}"
    finally:
        keeper.close()
