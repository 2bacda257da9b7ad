"""The results: medians with their spread, ratios, tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from .runs import Cell, Failed, Run, Spread
from .tables import memory, number, ratio, table, version
from .ways import HOP, NO_TRANSIT, NOTHING, TRANSIT, Pinged, Ways

SAVE_RESTORE = "save-restore"
#: Each of sevhop's methods, and what it is compared with.
PAIRS = (
    (HOP, "cpr-transfer"),
    (HOP, "x-ignore-shared"),
    (HOP, "precopy"),
    (HOP, "file"),
    (TRANSIT, HOP),
    (TRANSIT, NO_TRANSIT),
    (TRANSIT, SAVE_RESTORE),
    (NO_TRANSIT, SAVE_RESTORE),
)
#: The machines whose ratios are printed first.
COMPARED = ("minimal", "domain")
RICH = ("rich", "rich domain")


@dataclass(frozen=True)
class Report:
    """
    All of a run of the benchmark.

    :ivar about: properties of the host: name and value.
    :ivar foreign_hook_ms: calls of the hook for a domain that is in no hop.
    :ivar failures: runs in which the guest did not arrive.
    :ivar pings: upgrades of guests that were pinged.
    """

    runs: Sequence[Run]
    about: dict[str, str]
    foreign_hook_ms: Sequence[float] = ()
    failures: Sequence[Failed] = ()
    pings: Sequence[Pinged] = ()

    @property
    def ways(self) -> Ways:
        """The same by the way in which a domain gets another QEMU."""
        return Ways(self.runs, self.pings)

    def cells(self) -> list[Cell]:
        """All (machine, mode, memory), in the order of their first run."""
        return list(dict.fromkeys(run.cell for run in self.runs))

    def spread(self, cell: Cell, value: Callable[[Run], float]) -> Spread:
        """One value in all runs of a cell."""
        return Spread.of(value(run) for run in self.runs if run.cell == cell)

    def phases(self, cell: Cell) -> dict[str, float]:
        """The median of each phase, ms, in their order."""
        runs = [run for run in self.runs if run.cell == cell]
        names = dict.fromkeys(name for run in runs for name in run.phases)
        return {name: statistics.median(run.phases[name] for run in runs if name in run.phases) for name in names}

    def ratios(self, machines: Sequence[str] = COMPARED) -> dict[str, dict[str, float]]:
        """Ratio of median downtimes, sevhop's to the other, of the measured pairs: pair, then memory in MiB."""
        medians = {cell: self.spread(cell, _downtime).median for cell in self.cells() if cell[0] in machines}
        found: dict[str, dict[str, float]] = {}
        for ours, theirs in PAIRS:
            for machine, mode, size in sorted(medians):
                if mode == ours and (other := medians.get((machine, theirs, size))):
                    ratios = found.setdefault(f"{ours}/{theirs}", {})
                    ratios[str(size)] = medians[machine, ours, size] / other
        return found

    def compared(self) -> list[Cell]:
        """The cells of :data:`COMPARED`, each mode with one machine: a domain's devices do not matter to a hop."""
        cells = [cell for cell in self.cells() if cell[0] in COMPARED and cell[1] != NOTHING]
        machines = {mode: machine for machine in reversed(COMPARED) for named, mode, _ in cells if named == machine}
        return [cell for cell in cells if machines[cell[1]] == cell[0]]

    def growth(self) -> dict[str, float]:
        """Of sevhop's methods, the ratio of the median downtime with the most memory to that with the least."""
        found = {}
        for mode in dict.fromkeys(ours for ours, _ in PAIRS):
            cells = sorted(cell for cell in self.compared() if cell[1] == mode)
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
            "ways": self.ways.as_json(),
            "foreign_hook_ms": foreign,
            "failures": [asdict(failed) for failed in self.failures],
            "runs": [asdict(run) for run in self.runs],
        }

    def markdown(self) -> str:
        """The tables."""
        lines = [f"{name}: {value}  " for name, value in self.about.items()]
        lines += ["", "Guest downtime in ms: median (minimum to maximum). The other columns are medians: ms until the"]
        lines += ["downtime, ms in all, ms of processor time and MiB of memory in addition to the guest's.", ""]
        lines += table(
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
        lines += self.ways.markdown()
        for title, machines in (("", COMPARED), (", rich machine", RICH)):
            if ratios := self.ratios(machines):
                sizes = sorted({int(size) for row in ratios.values() for size in row})
                lines += ["", f"Ratio of median downtimes, sevhop to the other{title}.", ""]
                rows = [(pair, *(ratio(row.get(str(size))) for size in sizes)) for pair, row in ratios.items()]
                lines += table(("", *map(memory, sizes)), rows)
        if growth := self.growth():
            lines += ["", "Ratio of the median downtime with the most memory to that with the least:"]
            lines += [" ".join(f"{mode} {grown:.2f}" for mode, grown in growth.items())]
        if broken_down := [cell for cell in self.cells() if self.phases(cell)]:
            lines += ["", "By phase, medians in ms; after a colon is a part of the phase before it.", ""]
            rows = [(cell[0], memory(cell[2]), cell[1], _phases(self.phases(cell))) for cell in broken_down]
            lines += table(("machine", "memory", "mode", "phases"), rows)
        if self.foreign_hook_ms:
            lines += ["", f"The hook of a domain that is in no hop: {Spread.of(self.foreign_hook_ms)} ms."]
        for failed in self.failures:
            what = f"{failed.machine} {failed.mode}, {memory(failed.memory_mib)}" if failed.machine else failed.mode
            lines += ["", f"{what}, did not arrive: {failed.reason}"]
        return "\n".join(lines) + "\n"

    def _counted(self, cell: Cell, value: Callable[[Run], float | None]) -> dict[str, float] | None:
        """A value that not every host can measure."""
        runs = [run for run in self.runs if run.cell == cell]
        found = [known for run in runs if (known := value(run)) is not None]
        return asdict(Spread.of(found)) if found else None

    def _median(self, cell: Cell, value: Callable[[Run], float | None]) -> str:
        spread = self._counted(cell, value)
        return number(spread["median"]) if spread else ""

    def _versions(self, cell: Cell) -> str:
        runs = [run for run in self.runs if run.cell == cell]
        return ", ".join(dict.fromkeys(f"{version(run.source)} → {version(run.destination)}" for run in runs))


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


def _phases(phases: dict[str, float]) -> str:
    return ", ".join(f"{name} {number(ms)}" for name, ms in phases.items())
