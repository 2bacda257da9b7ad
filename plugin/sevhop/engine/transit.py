"""
The transit: a QEMU beside libvirt that has the guest of a domain while libvirt ends the old QEMU and starts the new
one.

It is the destination of one hop (:mod:`sevhop.engine.transit_hop`) and the source of the next. adopt.so has finished in
it, so it needs no keeper: all of the guest is its own, and nothing ends it but its guest or we.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from sevhop_qmp import adopt
from sevhop_qmp.errors import SevhopError
from sevhop_qmp.monitor import COMMAND_TIMEOUT, Monitor
from sevhop_qmp.process import QemuProcess

from ..guest import inspection
from ..process import apparmor_profile, machine_cgroup
from .destination import Destination

#: Name of a file in its directory: one byte, which is 1 when it has shut down because its guest was to be reset.
_REBOOT_MARK = "reboot-mark"


@dataclass
class Transit:
    """
    A transit that has the guest.

    :ivar destination: its process, with our connection to its monitor, and the directory of that.
    :ivar guest: as it was inspected in there.
    :ivar cgroups: directories of the cgroups that were made for it; see :mod:`sevhop.process.machine_cgroup`.
    :ivar apparmor_profile: name of the profile that was loaded for it; see :mod:`sevhop.process.apparmor_profile`.
    """

    destination: Destination
    guest: inspection.Guest
    cgroups: tuple[str, ...] = ()
    apparmor_profile: str = ""

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
        Kill it, when the guest is elsewhere, and remove its directory, cgroups and profile.

        :raises SevhopError: it still exists.
        """
        await self.destination.kill()
        await remove_confinement(self.cgroups, self.apparmor_profile)


async def remove_confinement(cgroups: Iterable[str], profile: str) -> None:
    """
    Remove what was made to confine a transit, which has exited. May be repeated.

    :param cgroups: directories, see :mod:`sevhop.process.machine_cgroup`.
    :param profile: name, see :mod:`sevhop.process.apparmor_profile`; empty without one.
    """
    await asyncio.to_thread(machine_cgroup.remove, cgroups)
    await asyncio.to_thread(apparmor_profile.remove, profile)


async def leave_reboot_mark(destination: Destination) -> str:
    """
    Have a QEMU that is to be a transit record it when it shuts down because its guest reboots, before that runs there:
    nobody may be connected to it then. See :mod:`sevhop.guest.reboot`.

    :return: a note if it does not, or an empty string.
    """
    try:
        fd = os.open(destination.directory / _REBOOT_MARK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, b"\0")
            await adopt.use_reboot_mark(destination.monitor, fd)
        finally:
            os.close(fd)
    except OSError as err:
        return f"cannot record reboots of the guest in the transit: {err.strerror}"
    except SevhopError as err:
        return f"cannot record reboots of the guest in the transit: {err.message}"
    return ""


def has_rebooted(directory: Path) -> bool:
    """Whether a transit has shut down because its guest was to be reset, as far as it records that."""
    try:
        return (directory / _REBOOT_MARK).read_bytes() == b"\1"
    except OSError:
        return False
