"""The report of a hop: its outcome, how long each phase took, and the downtime of the guest."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sevhop_qmp.move import MoveReport

from .errors import GuestState

#: Milliseconds after which a guest may notice by its clock that it was stopped.
LONG_STOP_MS = 1000.0
_SUSPENDED = "is suspended in the keeper; to resume it"


@dataclass(frozen=True)
class Phase:
    """A phase that is over, and how many milliseconds it took."""

    name: str
    ms: float


@dataclass(frozen=True)
class Clock:
    """
    The clock of a guest that was stopped for long.

    :ivar set: whether the guest agent has set it.
    :ivar detail: why not.
    """

    set: bool
    detail: str = ""

    def as_json(self) -> dict[str, object]:
        """For ``--json``."""
        return {"set": self.set, "detail": self.detail}


def stopped_for_long(stopped_ms: float | None, clock: Clock | None) -> str:
    """That a guest was stopped for so long that its clock matters; otherwise empty."""
    if stopped_ms is None or stopped_ms <= LONG_STOP_MS:
        return ""
    text = f"the guest was stopped for {stopped_ms / 1e3:.1f} s"
    if clock is None:
        return f"{text}: its clock may be behind"
    return (
        f"{text}; its guest agent has set the clock" if clock.set else f"{text}; its clock was not set: {clock.detail}"
    )


@dataclass
class Report:
    """
    The report of a hop.

    :ivar kind: ``standalone``, or ``domain`` of libvirt.
    :ivar context: ``none``, ``sev`` or ``sev-es``; empty when unknown.
    :ivar emulator: the QEMU to hop to; empty when unknown.
    :ivar outcome: ``done``, ``refused``, ``rolled-back``, ``recovery-required`` or ``guest-lost``; of an upgrade also
        ``prepared`` or ``checked``.
    :ivar reason: why it is not done, and what to do, in one line.
    :ivar hint: what to do, alone; empty when there is nothing to advise.
    :ivar guest_state: the state of the guest if it is not done.
    :ivar downtime_ms: milliseconds from the command that stops the source until the guest ran again, in either QEMU;
        None when it was never stopped. The longer one if there were two.
    :ivar downtimes_ms: both of an upgrade by way of a transit, in their order.
    :ivar rehearsal_ms: milliseconds for which the rehearsal has stopped the guest; None when it has not.
    :ivar clock: what has become of the clock of a domain's guest that was stopped for long; None if it was not.
    :ivar move: how the SEV context was moved; None if there is none, or it was not. The last one if there were two.
    :ivar image: the save image from which ``virsh restore`` completes a prepared upgrade.
    :ivar in_transit: whether the guest of a prepared upgrade runs in the transit.
    :ivar notes: what did not go as expected after the commit, none of which matters to the guest.
    """

    guest: str = ""
    kind: Literal["standalone", "domain"] = "standalone"
    context: str = ""
    emulator: str = ""
    source_pid: int = 0
    source_version: str = ""
    destination_pid: int = 0
    destination_version: str = ""
    phases: list[Phase] = field(default_factory=list)
    downtime_ms: float | None = None
    downtimes_ms: list[float] = field(default_factory=list)
    rehearsal_ms: float | None = None
    clock: Clock | None = None
    move: MoveReport | None = None
    image: Path | None = None
    in_transit: bool = False
    outcome: str = ""
    reason: str = ""
    hint: str = ""
    guest_state: GuestState | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def stopped_ms(self) -> float | None:
        """Milliseconds for which the guest was stopped in all; None if it never was."""
        times: list[float | None] = [self.rehearsal_ms]
        times += self.downtimes_ms or [self.downtime_ms]
        found = [ms for ms in times if ms is not None]
        return sum(found) if found else None

    def as_json(self) -> dict[str, object]:
        """The object that ``--json`` prints."""
        return {
            "guest": self.guest,
            "context": self.context,
            "emulator": self.emulator,
            "source": {"pid": self.source_pid, "version": self.source_version},
            "destination": {"pid": self.destination_pid, "version": self.destination_version},
            "phases": [{"name": phase.name, "ms": round(phase.ms, 3)} for phase in self.phases],
            "downtime_ms": _rounded(self.downtime_ms),
            "downtimes_ms": [round(ms, 3) for ms in self.downtimes_ms],
            "rehearsal_ms": _rounded(self.rehearsal_ms),
            "stopped_ms": _rounded(self.stopped_ms),
            "clock": None if self.clock is None else self.clock.as_json(),
            "move": None
            if self.move is None
            else {"attempts": self.move.attempts, "errno": self.move.errno, "ms": round(self.move.ms, 3)},
            "image": None if self.image is None else str(self.image),
            "in_transit": self.in_transit,
            "outcome": self.outcome,
            "reason": self.reason,
            "hint": self.hint or (f"run: {self._completion}" if self.outcome == "prepared" else ""),
            "guest_state": None if self.guest_state is None else self.guest_state.value,
            "notes": self.notes,
        }

    def __str__(self) -> str:
        """For people: a line, and one for each note."""
        stopped = stopped_for_long(self.stopped_ms, self.clock)
        if self.reason:
            return "; ".join(filter(None, [f"{self.guest}: {self.reason}", stopped]))
        if self.outcome == "checked":
            return f"{self.guest}: QEMU {self.source_version}, can hop to {self.emulator}"
        if self.image is not None:
            runs = "runs" if self.stopped_ms is not None else "is paused"
            where = f"{runs} in the transit; to complete the upgrade" if self.in_transit else _SUSPENDED
            return f"{self.guest}: the guest {where}: {self._completion}"
        line = f"{self.guest}: QEMU {self.source_version} -> {self.destination_version}"
        if self.kind == "standalone":
            line += f", now process {self.destination_pid}"
        downtimes = self.downtimes_ms or ([] if self.downtime_ms is None else [self.downtime_ms])
        line += f"; downtime {' and '.join(map(readable_ms, downtimes))}" if downtimes else "; it stayed paused"
        if self.rehearsal_ms is not None:
            line += f", and {readable_ms(self.rehearsal_ms)} for the rehearsal"
        return "\n".join([line, *(f"note: {note}" for note in (*filter(None, [stopped]), *self.notes))])

    @property
    def _completion(self) -> str:
        """What completes a prepared upgrade."""
        return f"sevhop recover {shlex.quote(self.guest)}, or virsh restore {self.image}"


def readable_ms(ms: float) -> str:
    """Milliseconds, with one decimal below 10."""
    return f"{ms:.1f} ms" if ms < 10 else f"{ms:.0f} ms"


def printable(text: str) -> str:
    """Text of a QEMU, its guest or an administrator with control characters escaped: a terminal would obey them."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def _rounded(ms: float | None) -> float | None:
    return None if ms is None else round(ms, 3)
