"""
The transit: a QEMU beside libvirt that has the guest of a domain while libvirt ends the old QEMU and starts the new
one.

It is the destination of one hop (:mod:`sevhop.engine.transit_hop`) and the source of the next. adopt.so has finished in
it, so it needs no keeper: all of the guest is its own, and nothing ends it but its guest or we.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from sevhop_qmp.monitor import COMMAND_TIMEOUT, Monitor
from sevhop_qmp.process import QemuProcess

from ..guest import inspection
from ..process import machine_cgroup
from .destination import Destination


@dataclass
class Transit:
    """
    A transit that has the guest.

    :ivar destination: its process, with our connection to its monitor, and the directory of that.
    :ivar guest: as it was inspected in there.
    :ivar cgroups: directories of the cgroups that were made for it; see :mod:`sevhop.process.machine_cgroup`.
    """

    destination: Destination
    guest: inspection.Guest
    cgroups: tuple[str, ...] = ()

    @property
    def process(self) -> QemuProcess:
        """It runs in a session of its own. It is our child if we have started it."""
        return self.destination.process

    @property
    def monitor(self) -> Monitor:
        """Ours; the only one that it has."""
        return self.destination.monitor

    @property
    def directory(self) -> Path:
        """That of its monitor's socket; only root can enter it."""
        return self.destination.directory

    @classmethod
    async def reach(
        cls, process: QemuProcess, directory: Path, cgroups: tuple[str, ...] = (), *, timeout: float = COMMAND_TIMEOUT
    ) -> Self:
        """
        Connect to a transit that another process has started.

        :param timeout: seconds for each command.
        :raises SevhopError: it does not answer, or its answers make no sense.
        """
        destination = await Destination.reach(process, directory, timeout=timeout)
        try:
            return cls(destination, await inspection.inspect(destination.monitor, process), cgroups)
        except BaseException:
            await destination.monitor.close()
            raise

    async def leave(self) -> None:
        """Disconnect. It keeps running, for another process to :meth:`reach`."""
        await self.destination.leave()

    async def kill(self) -> None:
        """
        Kill it, when the guest is elsewhere, and remove its directory and cgroups.

        :raises SevhopError: it still exists.
        """
        await self.destination.kill()
        await asyncio.to_thread(machine_cgroup.remove, self.cgroups)
