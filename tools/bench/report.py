"""The results: medians with their spread, ratios, tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Self

from .usage import Used

#: Each of sevhop's methods, and what it is compared with.
PAIRS = (
    ("hop", "cpr-transfer"),
    ("hop", "x-ignore-shared"),
    ("hop", "precopy"),
    ("hop", "file"),
    ("upgrade", "save-restore"),
)
#: The machines whose ratios are printed first. A domain has one of its own.
COMPARED = ("minimal", "domain")
RICH = ("rich",)


@dataclass(frozen=True)
class Outcome:
    """
    The measurements of one replacement of QEMU. Times are monotonic seconds, those of the downtime ns.

    :ivar downtime: begin and end of the guest's downtime.
    :ivar began: before the first command, and the start of a destination.
    :ivar ended: when the last command returned.
    :ivar phases: as the tool reports them: name and ms.
    """

    downtime: tuple[int, int]
    began: float
    ended: float
    phases: dict[str, float] = field(default_factory=dict)

    @property
    def downtime_ms(self) -> float:
        """The guest's downtime."""
        return (self.downtime[1] - self.downtime[0]) / 1e6


@dataclass(frozen=True)
class Run:
    """
    One replacement of QEMU.

    :ivar mode: the method.
    :ivar machine: what kind of guest: ``minimal``, ``rich``, or a ``domain`` of libvirt.
    :ivar memory_mib: of the guest, all of it touched.
    :ivar downtime_ms: measured in the guest.
    :ivar total_ms: from the first command to the end of the last.
    :ivar prepare_ms: the part of it before the downtime.
    :ivar cpu_ms: processor time beyond one processor for as long as the guest ran; None where it cannot be counted.
    :ivar memory_mib_more: the peak, less the usage before; None likewise.
    :ivar phases: as the tool reports them: name and ms.
    :ivar source, destination: versions of QEMU.
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

    @classmethod
    def of(cls, what: tuple[str, str, int], outcome: Outcome, used: Used | None, source: str, destination: str) -> Self:
        """
        From the measurements.

        :param what: mode, machine and memory_mib.
        """
        total, prepare = (outcome.ended - outcome.began) * 1e3, outcome.downtime[0] / 1e6 - outcome.began * 1e3
        run = cls(*what, outcome.downtime_ms, total, outcome.phases, source, destination, prepare)
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
        return f"{_number(self.median)} ({_number(self.low)} to {_number(self.high)})"


def _number(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


@dataclass(frozen=True)
class Report:
    """
    All of a run of the benchmark.

    :ivar about: properties of the host: name and value.
    :ivar failures: runs in which the guest did not arrive.
    :ivar foreign_hook_ms: calls of the hook for a domain that is in no hop.
    """

    runs: Sequence[Run]
    about: dict[str, str]
    foreign_hook_ms: Sequence[float] = ()
    failures: Sequence[Failed] = ()

    def cells(self) -> list[tuple[str, str, int]]:
        """All (machine, mode, memory), in the order of their first run."""
        return list(dict.fromkeys((run.machine, run.mode, run.memory_mib) for run in self.runs))

    def spread(self, cell: tuple[str, str, int], value: Callable[[Run], float]) -> Spread:
        """One value in all runs of a cell."""
        return Spread.of(value(run) for run in self.runs if (run.machine, run.mode, run.memory_mib) == cell)

    def phases(self, cell: tuple[str, str, int]) -> dict[str, float]:
        """The median of each phase, ms, in their order."""
        runs = [run for run in self.runs if (run.machine, run.mode, run.memory_mib) == cell]
        names = dict.fromkeys(name for run in runs for name in run.phases)
        return {name: statistics.median(run.phases[name] for run in runs if name in run.phases) for name in names}

    def ratios(self, machines: Sequence[str] = COMPARED) -> dict[str, dict[str, float]]:
        """Ratio of median downtimes, sevhop's to the other, of the measured pairs: pair, then memory in MiB."""
        medians = {
            (cell[1], cell[2]): self.spread(cell, _downtime).median for cell in self.cells() if cell[0] in machines
        }
        found: dict[str, dict[str, float]] = {}
        for ours, theirs in PAIRS:
            sizes = [size for mode, size in medians if mode == ours and medians.get((theirs, size))]
            if sizes:
                found[f"{ours}/{theirs}"] = {str(s): medians[ours, s] / medians[theirs, s] for s in sorted(sizes)}
        return found

    def growth(self) -> dict[str, float]:
        """Of sevhop's methods, the ratio of the median downtime with the most memory to that with the least."""
        found = {}
        for mode in dict.fromkeys(ours for ours, _ in PAIRS):
            cells = sorted(c for c in self.cells() if c[1] == mode and c[0] in COMPARED)
            if len(cells) > 1:
                small, large = (self.spread(cell, _downtime).median for cell in (cells[0], cells[-1]))
                found[mode] = large / small
        return found

    def as_json(self) -> dict[str, object]:
        """For ``--json``."""
        summary = [
            {
                "machine": cell[0],
                "mode": cell[1],
                "memory_mib": cell[2],
                "downtime_ms": asdict(self.spread(cell, _downtime)),
                "total_ms": asdict(self.spread(cell, _total)),
                "prepare_ms": asdict(self.spread(cell, _prepare)),
                "cpu_ms": self._counted(cell, _cpu),
                "memory_mib_more": self._counted(cell, _memory_more),
                "phases_ms": self.phases(cell),
            }
            for cell in self.cells()
        ]
        foreign = asdict(Spread.of(self.foreign_hook_ms)) if self.foreign_hook_ms else None
        return {
            "about": self.about,
            "summary": summary,
            "ratios": self.ratios(),
            "ratios_rich": self.ratios(RICH),
            "growth": self.growth(),
            "foreign_hook_ms": foreign,
            "failures": [asdict(failed) for failed in self.failures],
            "runs": [asdict(run) for run in self.runs],
        }

    def markdown(self) -> str:
        """The tables."""
        lines = [f"{name}: {value}  " for name, value in self.about.items()]
        lines += ["", "Guest downtime in ms: median (minimum to maximum). The other columns are medians: ms until the"]
        lines += ["downtime, ms in all, ms of processor time and MiB of memory in addition to the guest's.", ""]
        lines += _table(
            ("machine", "memory", "mode", "QEMU", "downtime", "prepare", "total", "CPU", "more memory", "runs"),
            (
                (
                    cell[0],
                    memory(cell[2]),
                    cell[1],
                    self._versions(cell),
                    str(self.spread(cell, _downtime)),
                    *(self._median(cell, value) for value in (_prepare, _total, _cpu, _memory_more)),
                    str(self.spread(cell, _downtime).count),
                )
                for cell in self.cells()
            ),
        )
        for title, machines in (("", COMPARED), (", rich machine", RICH)):
            if ratios := self.ratios(machines):
                sizes = sorted({int(size) for row in ratios.values() for size in row})
                lines += ["", f"Ratio of median downtimes, sevhop to the other{title}.", ""]
                rows = [(pair, *(_ratio(row.get(str(size))) for size in sizes)) for pair, row in ratios.items()]
                lines += _table(("", *map(memory, sizes)), rows)
        if growth := self.growth():
            lines += ["", "Ratio of the median downtime with the most memory to that with the least:"]
            lines += [" ".join(f"{mode} {ratio:.2f}" for mode, ratio in growth.items())]
        if broken_down := [cell for cell in self.cells() if self.phases(cell)]:
            lines += ["", "By phase, medians in ms; after a colon is a part of the phase before it.", ""]
            rows = [(cell[1], memory(cell[2]), _phases(self.phases(cell))) for cell in broken_down]
            lines += _table(("mode", "memory", "phases"), rows)
        if self.foreign_hook_ms:
            lines += ["", f"The hook of a domain that is in no hop: {Spread.of(self.foreign_hook_ms)} ms."]
        for failed in self.failures:
            what = f"{failed.machine} {failed.mode}, {memory(failed.memory_mib)}" if failed.machine else failed.mode
            lines += ["", f"{what}, did not arrive: {failed.reason}"]
        return "\n".join(lines) + "\n"

    def _counted(self, cell: tuple[str, str, int], value: Callable[[Run], float | None]) -> dict[str, float] | None:
        """A value that not every host can measure."""
        runs = [run for run in self.runs if (run.machine, run.mode, run.memory_mib) == cell]
        found = [known for run in runs if (known := value(run)) is not None]
        return asdict(Spread.of(found)) if found else None

    def _median(self, cell: tuple[str, str, int], value: Callable[[Run], float | None]) -> str:
        spread = self._counted(cell, value)
        return _number(spread["median"]) if spread else ""

    def _versions(self, cell: tuple[str, str, int]) -> str:
        runs = [run for run in self.runs if (run.machine, run.mode, run.memory_mib) == cell]
        return ", ".join(dict.fromkeys(f"{_short(run.source)} → {_short(run.destination)}" for run in runs))


def _downtime(run: Run) -> float:
    return run.downtime_ms


def _total(run: Run) -> float:
    return run.total_ms


def _prepare(run: Run) -> float:
    return run.prepare_ms


def _cpu(run: Run) -> float | None:
    return run.cpu_ms


def _memory_more(run: Run) -> float | None:
    return run.memory_mib_more


def _short(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _phases(phases: dict[str, float]) -> str:
    return ", ".join(f"{name} {_number(ms)}" for name, ms in phases.items())


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if value < 0.1 else f"{value:.2f}"


def memory(mib: int) -> str:
    """A size of memory, for people."""
    return f"{mib // 1024} GB" if mib >= 1024 and mib % 1024 == 0 else f"{mib} MB"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
