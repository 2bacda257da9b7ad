"""
The ways in which a running guest gets another QEMU, side by side: each is a few rows, sizes of memory are columns.

What sevhop reports of itself and what was seen in the guest are rows of their own. The guest's longest gap is that of
the whole upgrade: what else makes the guest wait for a processor counts as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from .runs import Run, Spread
from .tables import memory, ratio, table, version

#: ``sevhop hop`` of a guest with the devices of the domain, and both ways of ``sevhop upgrade``.
HOP, TRANSIT, NO_TRANSIT = "hop", "upgrade", "upgrade-no-transit"
#: Nothing is done, for as long as an upgrade takes: how long the host keeps a guest waiting anyway.
NOTHING = "nothing"
WAYS = (TRANSIT, NO_TRANSIT, HOP, NOTHING)
#: The options by which a way of ``sevhop upgrade`` is chosen. Without one it is by way of a transit where that can be.
OPTIONS: dict[str, tuple[str, ...]] = {TRANSIT: (), NO_TRANSIT: ("--no-transit",)}

#: Kind of machine -> a domain like that.
DOMAINS = {"minimal": "domain", "rich": "rich domain"}

_PAUSE, _LONGER = "the pause", "the longer pause"
_GAP = "the guest's longest gap"


@dataclass(frozen=True)
class Pinged:
    """
    An upgrade of a Linux guest that was pinged meanwhile, through a bridge.

    :ivar mode: the way.
    :ivar machine: one of :data:`DOMAINS`.
    :ivar sent: pings, at a fixed rate.
    :ivar lost: those that were never answered.
    :ivar reported_ms: the longest pause that sevhop reports.
    """

    mode: str
    machine: str
    memory_mib: int
    sent: int
    lost: int
    reported_ms: float


@dataclass(frozen=True)
class Row:
    """
    A row of a table.

    :ivar values: size of memory in MiB -> what was measured, or a ratio of medians.
    """

    title: str
    values: dict[int, Spread | float]

    def as_json(self) -> dict[str, object]:
        """For ``--json``."""
        return {"title": self.title} | {
            str(size): asdict(value) if isinstance(value, Spread) else value for size, value in self.values.items()
        }

    def cells(self, sizes: Iterable[int]) -> list[str]:
        """For a table. Spreads have the number of runs beside the title."""
        counts = sorted({value.count for value in self.values.values() if isinstance(value, Spread)})
        n = f", n={' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))}" if counts else ""
        return [self.title + n, *(_text(self.values.get(size)) for size in sizes)]


@dataclass(frozen=True)
class Ways:
    """
    All of a run of the benchmark that belongs to these ways.

    :ivar runs: those on other machines are left out.
    """

    runs: Sequence[Run]
    pings: Sequence[Pinged] = ()

    def tables(self) -> dict[str, list[Row]]:
        """Machine -> what is known of it, if anything."""
        return {machine: rows for machine in DOMAINS.values() if (rows := self._rows(machine))}

    def as_json(self) -> dict[str, object]:
        """For ``--json``."""
        tables = {machine: [row.as_json() for row in rows] for machine, rows in self.tables().items()}
        return {"tables": tables, "pings": [asdict(one) for one in self.pings]}

    def markdown(self) -> list[str]:
        """The tables, as lines."""
        lines = []
        for machine, rows in self.tables().items():
            sizes = sorted({size for row in rows for size in row.values})
            lines += ["", f"Pauses of a {machine} in ms: median (minimum to maximum), and ratios of medians.", ""]
            lines += table(("", *map(memory, sizes)), (row.cells(sizes) for row in rows))
        return lines

    def _rows(self, machine: str) -> list[Row]:
        rows = [row for busy in (False, True) for mode in WAYS for row in self._of_a_way(machine, mode, busy)]
        for mode in WAYS:
            found = [one for one in self.pings if (one.machine, one.mode) == (machine, mode)]
            lost = _spreads((one.memory_mib, one.lost) for one in found)
            rows.append(Row(f"{_title(mode)}: pings lost", {**lost}))
        for busy in (False, True):
            for what, of in ((_LONGER, self._pauses), (_GAP, self._gaps)):
                title = f"{_title(TRANSIT)} to {_title(HOP, busy)}: {what}"
                rows.append(_ratio(title, of(machine, TRANSIT, busy), of(machine, HOP, busy)))
        for mode in WAYS:
            for what, of in ((_pause(mode), self._pauses), (_GAP, self._gaps)):
                title = f"{_title(mode)}, busy host to idle one: {what}"
                rows.append(_ratio(title, of(machine, mode, True), of(machine, mode, False)))
        return [row for row in rows if row.values]

    def _of_a_way(self, machine: str, mode: str, busy: bool) -> list[Row]:
        title = _title(mode, busy)
        # In both directions together, and, of an upgrade, in each.
        directions = sorted({version(run.destination) for run in self._runs(machine, mode, busy)})
        rows = [Row(f"{title}: {_pause(mode)}", {**self._pauses(machine, mode, busy)})]
        for into in directions if mode == TRANSIT else ():
            rows.append(Row(f"{title}: the same into {into}", {**self._pauses(machine, mode, busy, into)}))
        return [*rows, Row(f"{title}: {_GAP}", {**self._gaps(machine, mode, busy)})]

    def _runs(self, machine: str, mode: str, busy: bool) -> list[Run]:
        return [run for run in self.runs if (run.machine, run.mode, run.busy) == (machine, mode, busy)]

    def _pauses(self, machine: str, mode: str, busy: bool, into: str = "") -> dict[int, Spread]:
        """As sevhop reports them: of an upgrade by way of a transit the longer one."""
        return _spreads(
            (run.memory_mib, run.reported_ms)
            for run in self._runs(machine, mode, busy)
            if run.reported_ms is not None and into in ("", version(run.destination))
        )

    def _gaps(self, machine: str, mode: str, busy: bool) -> dict[int, Spread]:
        return _spreads((run.memory_mib, run.downtime_ms) for run in self._runs(machine, mode, busy))


def _title(mode: str, busy: bool = False) -> str:
    names = {HOP: "`sevhop hop`", NOTHING: "nothing done"}
    name = names.get(mode) or f"`{' '.join(('sevhop upgrade', *OPTIONS[mode]))}`"
    return f"{name}, busy host" if busy else name


def _pause(mode: str) -> str:
    return _LONGER if mode == TRANSIT else _PAUSE


def _spreads(values: Iterable[tuple[int, float]]) -> dict[int, Spread]:
    """By size of memory."""
    found: dict[int, list[float]] = {}
    for size, value in values:
        found.setdefault(size, []).append(value)
    return {size: Spread.of(found[size]) for size in sorted(found)}


def _ratio(title: str, ours: dict[int, Spread], theirs: dict[int, Spread]) -> Row:
    sizes = [size for size, spread in theirs.items() if size in ours and spread.median]
    return Row(title, {size: ours[size].median / theirs[size].median for size in sizes})


def _text(value: Spread | float | None) -> str:
    return str(value) if isinstance(value, Spread) else ratio(value)
