"""What a recovery of an interrupted hop came to."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class End(enum.Enum):
    """What a recovery came to."""

    SOURCE = "runs in the old QEMU"
    DESTINATION = "runs in the new QEMU"
    GONE = "is gone"
    UNDER_WAY = "is being hopped"
    STUCK = "manual action required"


@dataclass(frozen=True)
class Recovered:
    """
    One hop, after the recovery.

    :ivar text: the reason, or what is worth knowing.
    """

    guest: str
    end: End
    text: str = ""

    def __str__(self) -> str:
        return f"{self.guest}: {self.end.value}" + (f": {self.text}" if self.text else "")

    def as_json(self) -> dict[str, object]:
        """For ``--json``."""
        return {"guest": self.guest, "end": self.end.name.lower().replace("_", "-"), "text": self.text}
