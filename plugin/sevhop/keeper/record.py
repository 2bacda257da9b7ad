"""What has happened to the guest of a keeper so far: reported to the command, and stored for the keeper's successor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from .state import State


@dataclass
class KeeperRecord:
    """
    Values only; descriptors are stored beside them.

    :ivar reason: why the last restore failed.
    :ivar emulator: for the next restore.
    :ivar released: the guest is not needed any more.
    :ivar peer: pid of the process that has asked for the guest's memory.
    :ivar version: of the destination.
    :ivar restore_began: when the last restore began (CLOCK_MONOTONIC, seconds); 0 before the first.
    :ivar until_started_ms: milliseconds from there to its commit.
    :ivar commit_ms: milliseconds that the commit took.
    :ivar note: of the commit, for the administrator; or empty.
    """

    emulator: str
    state: State = State.HELD
    reason: str = ""
    released: bool = False
    peer: int | None = None
    version: str = ""
    restore_began: float = 0.0
    until_started_ms: float = 0.0
    commit_ms: float = 0.0
    note: str = ""

    def as_fields(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"state": self.state.value}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """The reverse of :meth:`as_fields`."""
        return cls(**(dict(fields) | {"state": State(fields["state"])}))
