"""What is measured: one replacement of QEMU, and the distribution of several."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Self, TypeAlias

from .tables import number
from .usage import Used

#: Machine, mode, and MiB of memory.
Cell: TypeAlias = tuple[str, str, int]


@dataclass(frozen=True)
class Outcome:
    """
    The measurements of one replacement of QEMU. Times are monotonic seconds, those of the downtime ns.

    :ivar downtime: begin and end of the guest's downtime.
    :ivar began: before the first command, and the start of a destination.
    :ivar ended: when the last command returned.
    :ivar phases: as the tool reports them: name and ms.
    :ivar reported_ms: the longest pause that sevhop reports; None of other tools.
    """

    downtime: tuple[int, int]
    began: float
    ended: float
    phases: dict[str, float] = field(default_factory=dict)
    reported_ms: float | None = None

    @property
    def downtime_ms(self) -> float:
        """The guest's downtime."""
        return (self.downtime[1] - self.downtime[0]) / 1e6


@dataclass(frozen=True)
class Run:
    """
    One replacement of QEMU.

    :ivar mode: the method.
    :ivar machine: what kind of guest: ``minimal``, ``rich``, or a ``domain`` or ``rich domain`` of libvirt.
    :ivar memory_mib: of the guest, all of it touched.
    :ivar downtime_ms: measured in the guest.
    :ivar total_ms: from the first command to the end of the last.
    :ivar prepare_ms: the part of it before the downtime.
    :ivar cpu_ms: processor time beyond one processor for as long as the guest ran; None where it cannot be counted.
    :ivar memory_mib_more: the peak, less the usage before; None likewise.
    :ivar phases: as the tool reports them: name and ms.
    :ivar source, destination: versions of QEMU.
    :ivar reported_ms: the longest pause that sevhop reports; None of other tools.
    :ivar busy: each processor of the host was busy.
    """

    mode: str
    machine: str
    memory_mib: int
    downtime_ms: float
    total_ms: float
    phases: dict[str, float] = field(default_factory=dict)
    source: str = ""
    destination: str = ""
    prepare_ms: float = 0.0
    cpu_ms: float | None = None
    memory_mib_more: float | None = None
    reported_ms: float | None = None
    busy: bool = False

    @property
    def cell(self) -> Cell:
        """Runs with the same machine, mode and memory belong together."""
        return f"{self.machine}, busy host" if self.busy else self.machine, self.mode, self.memory_mib

    @classmethod
    def of(cls, what: tuple[str, str, int], outcome: Outcome, used: Used | None, source: str, destination: str) -> Self:
        """
        From the measurements.

        :param what: mode, machine and memory_mib.
        """
        total, prepare = (outcome.ended - outcome.began) * 1e3, outcome.downtime[0] / 1e6 - outcome.began * 1e3
        run = cls(*what, outcome.downtime_ms, total, outcome.phases, source, destination, prepare)
        run = replace(run, reported_ms=outcome.reported_ms)
        if used is None:
            return run
        guest = used.elapsed_ms - outcome.downtime_ms
        return replace(run, cpu_ms=max(used.cpu_ms - guest, 0.0), memory_mib_more=used.memory_mib)


@dataclass(frozen=True)
class Failed:
    """
    A run in which the guest did not arrive.

    :ivar reason: one line or a few.
    """

    mode: str
    machine: str
    memory_mib: int
    reason: str

    def __str__(self) -> str:
        what = f"{self.machine} {self.mode} {self.memory_mib} MiB" if self.memory_mib else self.mode
        return f"{what}: {self.reason}"


@dataclass(frozen=True)
class Spread:
    """The distribution of several measurements."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """:raises ValueError: there are none."""
        found = sorted(values)
        if not found:
            raise ValueError("nothing was measured")
        return cls(statistics.median(found), found[0], found[-1], len(found))

    def __str__(self) -> str:
        return f"{number(self.median)} ({number(self.low)} to {number(self.high)})"
