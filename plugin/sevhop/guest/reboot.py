"""
What a reboot of the guest is after a hop.

QEMU reboots a guest by resetting its processors, which start again at the firmware. That of an SEV guest was encrypted
at launch, in place: it is firmware in these pages of memory only. If they are shared memory, the destination has the
very same pages, and a reset is what it was in the source. If they are private to the source, the destination has an
image there that was never encrypted, and a reset would execute what is no code; so a reboot becomes a shutdown there.

RAM that is no memory backend, such as the firmware, is shared if QEMU was started with ``-machine aux-ram-share=on``,
which QEMU 10.0 and later have.

SEV-ES guests cannot be reset: QEMU before 11.0 shuts them down instead, hop or not, and 11.0 launches them again, which
it cannot in a destination.
"""

from __future__ import annotations

from dataclasses import replace

from .inspection import ENCRYPTED_BLOCKS, Guest
from .runtime_settings import Settings

#: The QEMU that has ``aux-ram-share``.
SINCE = (10, 0)
#: The arguments by which it is switched on.
SHARED_FIRMWARE = ("-machine", "aux-ram-share=on")


def stops(guest: Guest) -> bool:
    """
    Whether a reboot of this guest is a shutdown after a hop.

    :param guest: as it is in the source.
    """
    if guest.context.kind == "none":
        return False
    firmware = [block for name, block in guest.blocks.items() if name in ENCRYPTED_BLOCKS]
    return guest.context.kind != "sev" or not firmware or not all(block.shared for block in firmware)


def settings_after_hop(guest: Guest, ours: Settings) -> Settings:
    """
    The settings that the destination must get.

    :param guest: as it is in the source.
    :param ours: the source's settings.
    """
    return replace(ours, actions=ours.actions | {"reboot": "shutdown"}) if stops(guest) else ours
