"""A domain whose guest cannot be reset after its hop: its new QEMU records a reboot, and libvirt's hook acts on it."""

from __future__ import annotations

import os

from sevhop_qmp import adopt
from sevhop_qmp.adopt import DescriptorSender
from sevhop_qmp.errors import SevhopError

from ..records import reboot_mark
from .config import KeeperConfig

_STAYS_OFF = "its next reboot is a shutdown, after which the domain stays off; start it then (virsh start)"


async def stop_at_reboot(config: KeeperConfig, monitor: DescriptorSender) -> str:
    """
    Have the destination shut down when its guest reboots, and give it a
    :mod:`reboot mark <sevhop.records.reboot_mark>`, before the guest runs there: nobody else has to be there later.

    If the guest can be reset, nothing is set, and a mark that was left behind is removed.

    :return: a note if there is no mark, or an empty string.
    :raises SevhopError: the destination does not shut down at a reboot.
    """
    if not config.stops_at_reboot:
        reboot_mark.remove(config.name)
        return ""
    await monitor.execute("set-action", {"reboot": "shutdown"})
    try:
        fd = reboot_mark.make(config.name, config.uuid, config.uri)
        try:
            await adopt.use_reboot_mark(monitor, fd)
        finally:
            os.close(fd)
    except SevhopError as err:
        reboot_mark.remove(config.name)
        return f"cannot record reboots of the guest: {err.message}; {_STAYS_OFF}"
    return ""
