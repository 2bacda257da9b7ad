"""
The source as the keeper knows it, and its termination.

It is stopped (SIGSTOP), so that nobody can resume the guest any more; then it is verified that nobody has since the
state was saved (:mod:`sevhop_qmp.image_locks`); and only then is it killed. Nothing is lost by that: QEMU has given up
its disk images, and they were flushed before. If somebody has, the source continues.
"""

from __future__ import annotations

import asyncio
import logging

from sevhop_qmp.address_space import AddressSpace
from sevhop_qmp.errors import ProcessError
from sevhop_qmp.image_locks import ImageLocks
from sevhop_qmp.process import QemuProcess

from ..disks.images import Images
from .config import KeeperConfig

log = logging.getLogger(__name__)

#: Seconds within which a killed QEMU should have exited.
KILL_TIMEOUT = 10.0
#: Seconds for which a source's mappings stay when it has exited. The guest should run again by then.
_MAPPINGS_KEPT = 5.0


class Source:
    """
    The old QEMU.

    :ivar images: its disk images; None where disks are not compared.
    """

    def __init__(self, config: KeeperConfig) -> None:
        self.process = QemuProcess.open(config.pid)
        self.images = None if config.disks is None else Images(config.disks, self.process)
        self._locks = ImageLocks.of(self.process)

    async def stop(self, timeout: float) -> str:
        """
        Stop it for good, unless the guest was resumed since its state was saved.

        :return: why it continues; empty when it is stopped, or has exited unexpectedly.
        """
        reason = ""
        # One that has exited unexpectedly has nothing that is not saved.
        if not await self.process.freeze(timeout):
            if self.process.alive:
                reason = (
                    f"cannot stop the old QEMU: process {self.process.pid} still runs after {timeout:g} s; see dmesg"
                )
        elif self._locks.known and not self._locks.given_up:
            reason = "another client has resumed the guest"
        elif self._locks.kept():
            reason = "cannot terminate the old QEMU: it has not released all disks; find the job that uses one"
        elif self.images is not None and self.images.files.changed():
            reason = "another client has changed the disks"
        if reason:
            self.process.thaw()
        return reason

    async def kill(self) -> None:
        """
        Kill it, and wait until it has exited. It executes nothing any more; but one in an uninterruptible wait for a
        disk is still there, and the destination may need that disk.
        """
        self._keep_mappings()
        self.process.kill()
        while not await self.process.wait(KILL_TIMEOUT):
            log.warning("the old QEMU (process %d) was killed and has not exited yet", self.process.pid)
        self._locks.close()
        if self.images is not None:
            self.images.close()

    def _keep_mappings(self) -> None:
        """So that nobody waits until the kernel has unmapped all the guest's memory."""
        try:
            mappings = AddressSpace(self.process.pid)
        except ProcessError as err:
            log.info("%s", err)
        else:
            asyncio.get_running_loop().call_later(_MAPPINGS_KEPT, mappings.close)
