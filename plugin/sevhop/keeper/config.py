"""What a command and its keeper agree on: the configuration on standard input, the size of a request, the error."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from typing import Self

from sevhop_qmp.errors import SevhopError
from sevhop_qmp.monitor import COMMAND_TIMEOUT
from sevhop_qmp.ram_blocks import RamBlock

from ..disks.block_graph import BlockGraph
from ..guest.inspection import SevContext

#: Bytes of the longest request or reply.
MESSAGE = 4096


class KeeperError(SevhopError):
    """The keeper refused, or has exited."""


class KeeperTimeout(KeeperError):
    """It did not reply in time, and may still do what was requested."""


@dataclass(frozen=True)
class TransitConfig:
    """
    A transit, and what is to be done when its guest ends there, since libvirt does not know of it.

    :ivar monitor: path of its QMP socket, to which no other client is connected.
    :ivar directory: its own, removed when it has ended.
    :ivar cgroups: directories of the cgroups that were made for it, removed as well.
    :ivar apparmor_profile: name of the profile that was loaded for it, likewise; empty without one.
    :ivar on_poweroff, on_reboot, on_crash: of the domain; empty where its XML has none.
    :ivar settings: made at run time, for the destination; see :mod:`sevhop.guest.saved_settings`.
    """

    monitor: str
    directory: str
    cgroups: tuple[str, ...] = ()
    apparmor_profile: str = ""
    on_poweroff: str = ""
    on_reboot: str = ""
    on_crash: str = ""
    settings: str = ""


@dataclass(frozen=True)
class KeeperConfig:
    """
    What a new keeper needs.

    :ivar name, uuid: of the domain.
    :ivar uri: of its daemon.
    :ivar pid: of the source.
    :ivar uid, gid: that QEMU runs as.
    :ivar emulator: for the destination.
    :ivar blocks: the source's RAM blocks.
    :ivar disks: the source's disks, which the destination must have.
    :ivar encrypted: names of those whose content cannot be copied.
    :ivar stops_at_reboot: whether a reboot of the guest becomes a shutdown; see :func:`sevhop.guest.reboot.stops`.
    :ivar move_deadline: seconds for which a move that is refused as busy is retried.
    :ivar step_timeout: seconds within which the destination must answer.
    :ivar transit: if the guest runs in a transit, which is ``pid`` then.
    :ivar command: pid of the command that starts the keeper.
    """

    name: str
    uuid: str
    uri: str
    pid: int
    uid: int
    gid: int
    emulator: str
    context: SevContext
    blocks: tuple[RamBlock, ...]
    encrypted: tuple[str, ...]
    stops_at_reboot: bool = False
    disks: BlockGraph | None = None
    move_deadline: float = 2.0
    step_timeout: float = COMMAND_TIMEOUT
    transit: TransitConfig | None = None
    command: int = field(default_factory=os.getpid)

    def as_json(self) -> str:
        """For the keeper's standard input."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The reverse of :meth:`as_json`."""
        fields = json.loads(text)
        fields["context"] = SevContext(**fields["context"])
        rows = [row | {"inode": row["inode"] and tuple(row["inode"])} for row in fields["blocks"]]
        fields["blocks"] = tuple(RamBlock(**row) for row in rows)
        if fields["disks"] is not None:
            fields["disks"] = BlockGraph.from_fields(fields["disks"])
        fields["encrypted"] = tuple(fields["encrypted"])
        if fields["transit"] is not None:
            fields["transit"] = TransitConfig(**fields["transit"] | {"cgroups": tuple(fields["transit"]["cgroups"])})
        return cls(**fields)
