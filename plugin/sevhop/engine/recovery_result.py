"""The result of recovering an interrupted hop."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from ..records.hop_record import HopRecord, uptime
from ..report import Clock, stopped_for_long


class RecoveryOutcome(enum.Enum):
    """Where a guest is after the recovery of its hop."""

    SOURCE = "runs in the old QEMU"
    DESTINATION = "runs in the new QEMU"
    SAVED = "is saved to disk by another client"
    GONE = "is gone"
    IN_PROGRESS = "hop in progress"
    MANUAL = "manual action required"
    POSTPONED = "not tried again yet"
    DISCARDED = "was given up"


@dataclass(frozen=True)
class RecoveredGuest:
    """
    One guest, after the recovery of its hop.

    :ivar detail: the reason, or what is worth knowing.
    :ivar stopped_ms: milliseconds for which the hop and its recovery have stopped the guest, if that is known.
    :ivar clock: what has become of the guest's clock then.
    """

    guest: str
    result: RecoveryOutcome
    detail: str = ""
    stopped_ms: float | None = None
    clock: Clock | None = None

    @property
    def name(self) -> str:
        """Of the result, for programs."""
        return self.result.name.lower().replace("_", "-")

    def __str__(self) -> str:
        return ": ".join(filter(None, [self.guest, self.result.value, self.text]))

    @property
    def text(self) -> str:
        """The detail, and that the guest was stopped for long if it was."""
        return "; ".join(filter(None, [self.detail, stopped_for_long(self.stopped_ms, self.clock)]))

    def as_json(self) -> dict[str, object]:
        """For ``--json``."""
        return {
            "guest": self.guest,
            "result": self.name,
            "detail": self.detail,
            "stopped_ms": None if self.stopped_ms is None else round(self.stopped_ms, 3),
            "clock": None if self.clock is None else self.clock.as_json(),
        }


@dataclass(frozen=True)
class Loss:
    """
    What would be lost with a guest.

    :ivar guest: its name; or that of its journal, which is damaged.
    :ivar state: where it is: ``transit``, ``keeper``, ``hanging-keeper`` or ``nowhere``; or where it stays, if only the
        journal is removed: ``domain`` in libvirt's QEMU, ``outside`` of libvirt in its own.
    :ivar text: what is lost, in one line.
    """

    guest: str
    state: str
    text: str

    @property
    def has_guest(self) -> bool:
        """Whether a guest is lost, or may be."""
        return self.state in ("transit", "keeper", "hanging-keeper")

    def __str__(self) -> str:
        return f"{self.guest}: {self.text}"


def stopped_until_now(record: HopRecord) -> float | None:
    """
    Milliseconds for which a hop has stopped its guest, which runs again now.

    :return: None if the guest was paused before, or that was not recorded.
    """
    if not record.running or not record.stopped_at:
        return None
    return record.stopped_ms + (uptime() - record.stopped_at) * 1e3
