"""The result of recovering an interrupted hop."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class RecoveryOutcome(enum.Enum):
    """Where a guest is after the recovery of its hop."""

    SOURCE = "runs in the old QEMU"
    DESTINATION = "runs in the new QEMU"
    SAVED = "is saved to disk by another client"
    GONE = "is gone"
    IN_PROGRESS = "hop in progress"
    MANUAL = "manual action required"


@dataclass(frozen=True)
class RecoveredGuest:
    """
    One guest, after the recovery of its hop.

    :ivar detail: the reason, or what is worth knowing.
    """

    guest: str
    result: RecoveryOutcome
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.guest}: {self.result.value}" + (f": {self.detail}" if self.detail else "")

    def as_json(self) -> dict[str, object]:
        """For ``--json``."""
        return {"guest": self.guest, "result": self.result.name.lower().replace("_", "-"), "detail": self.detail}
