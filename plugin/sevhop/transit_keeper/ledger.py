"""What has happened to a guest in the transit so far: reported to the command, stored for the keeper's successor."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from ..keeper.fdstore import FdStore
from ..keeper.transit_state import FINISHED, TransitState
from .attempt import TransitAttempt

log = logging.getLogger(__name__)


@dataclass
class TransitRecord:
    """
    Values only; descriptors are stored beside them.

    :ivar emulator: for the next restore.
    :ivar reason: why the last restore failed, or why the guest is off.
    :ivar released: the keeper is not needed any more.
    :ivar destination: pid of the process that has asked for the guest's memory; 0 before.
    :ivar version: of its QEMU.
    :ivar restores: how many have begun.
    :ivar was_paused: the guest was paused when its hop began, so that a hop that is interrupted does not resume it.
    :ivar moving: the SEV context is about to be moved, or was: where it is must be asked before a QEMU runs the guest.
    :ivar committed: the guest is the destination's. The run mark says that only of one that runs.
    :ivar move: how the move of the SEV context went, a :class:`sevhop_qmp.move.MoveReport`; None before.
    :ivar downtime_ms: milliseconds for which the guest was stopped by its hop; 0 before.
    :ivar note: for the administrator; or empty.
    """

    emulator: str
    state: TransitState = TransitState.TRANSIT
    reason: str = ""
    released: bool = False
    destination: int = 0
    version: str = ""
    restores: int = 0
    was_paused: bool = False
    moving: bool = False
    committed: bool = False
    move: dict[str, Any] | None = None
    downtime_ms: float = 0.0
    note: str = ""

    def as_fields(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"state": self.state.value}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """The reverse of :meth:`as_fields`."""
        return cls(**(dict(fields) | {"state": TransitState(fields["state"])}))


class Ledger:
    """
    The record and the restore in progress, and their checkpoints.

    :ivar attempt: the restore in progress; None if there is none.
    """

    def __init__(self, emulator: str) -> None:
        self.record = TransitRecord(emulator)
        self.attempt: TransitAttempt | None = None
        self._fd_store = FdStore({}, {})

    def restore(self, fd_store: FdStore) -> Mapping[str, Any] | None:
        """
        Have the record of the last keeper.

        :return: what it has stored about a restore in progress; None if there was none.
        """
        self._fd_store = fd_store
        if not fd_store.record:
            return None
        self.record = TransitRecord.from_fields(fd_store.record["record"])
        attempt: Mapping[str, Any] | None = fd_store.record["attempt"]
        return attempt

    def checkpoint(self) -> None:
        """Store the state: whatever comes next is done by this keeper or by its successor."""
        attempt, record = self.attempt, self.record
        hopping = record.state is TransitState.HOPPING
        descriptors = {} if attempt is None else attempt.descriptors(hopping=hopping)
        stored = {"record": record.as_fields(), "attempt": attempt.as_fields() if attempt else None}
        needed = record.state not in FINISHED and not record.released
        self._fd_store.store(stored, descriptors, needed=needed)

    def enter(self, state: TransitState) -> None:
        """The guest is in this state from now on."""
        log.info("state %s", state.value)
        self.record.state = state
        self.checkpoint()
