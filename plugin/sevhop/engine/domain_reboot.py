"""A domain whose guest cannot be reset after its hop: its new QEMU records a reboot, and libvirt's hook acts on it."""

from __future__ import annotations

import os

from sevhop_qmp import adopt
from sevhop_qmp.adopt import DescriptorSender
from sevhop_qmp.errors import SevhopError

from ..records import reboot_mark


async def record_reboots(monitor: DescriptorSender, name: str, uuid: str, uri: str, *, stops: bool) -> list[str]:
    """
    Give the new QEMU of a domain, which runs, a :mod:`reboot mark <sevhop.records.reboot_mark>`. May be repeated.

    :param uri: of the daemon.
    :param stops: see :func:`sevhop.guest.reboot.stops`. If not, there is no mark afterwards.
    :return: a note if that is not possible.
    """
    if not stops:
        reboot_mark.remove(name)
        return []
    try:
        fd = reboot_mark.make(name, uuid, uri)
        try:
            await adopt.use_reboot_mark(monitor, fd)
        finally:
            os.close(fd)
    except SevhopError as err:
        reboot_mark.remove(name)
        return [f"a reboot of the guest will be a shutdown, after which the domain stays off: {err.message}"]
    return []
