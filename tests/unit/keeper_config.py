"""The configuration of a keeper, for a guest that never ran."""

from __future__ import annotations

import os

from sevhop.guest.inspection import SevContext
from sevhop.keeper.config import KeeperConfig
from sevhop_qmp.ram_blocks import RamBlock

UUID = "11111111-2222-3333-4444-55555555550a"
BLOCKS = (
    RamBlock("pc.ram", 0x7F0000000000, 1 << 26, 1 << 26, ("00:01", 4711), True),
    RamBlock("pc.rom", 0x7F1000000000, 1 << 17, 1 << 17, None, False),
)


def config() -> KeeperConfig:
    return KeeperConfig(
        name="web",
        uuid=UUID,
        uri="qemu:///system",
        pid=os.getpid(),
        uid=os.getuid(),
        gid=os.getgid(),
        emulator="/opt/qemu",
        context=SevContext("sev", 1, 7, "ab" * 48),
        blocks=BLOCKS,
        encrypted=("pc.bios",),
    )
