"""The report as a diagram: downtime over memory, both on logarithmic scales, and the phases of sevhop's downtime."""

from __future__ import annotations

import math
from collections.abc import Iterable
from xml.sax.saxutils import escape

from .report import PAIRS, Report
from .runs import Cell
from .tables import memory
from .ways import HOP, NO_TRANSIT, TRANSIT

_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 160, 40, 50
_COLOURS = ("#1b6ca8", "#c8553d", "#588157", "#8d5a97", "#b08900", "#5c677d", "#2a9d8f")
#: Height of a line of text.
_LINE = 14
_HOP = ("stop", "map", "save", "load", "commit", "resume")
#: Phases of the downtime, by mode; it begins in "stop". A hop kills the source after the downtime, an upgrade without a
#: transit in it. With one they are those of the first hop.
_STOPPED = {HOP: _HOP, TRANSIT: _HOP, NO_TRANSIT: ("stop", "save", "terminate", "restore")}


def svg(report: Report) -> str:
    """The diagram."""
    cells = report.compared()
    modes = list(dict.fromkeys(cell[1] for cell in cells))
    colours = {mode: _COLOURS[n % len(_COLOURS)] for n, mode in enumerate(modes)}
    bars = _bars(report)
    height = _HEIGHT + 40 + 34 * len(bars)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        *_curves(report, cells, colours),
        *_breakdown(bars),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _curves(report: Report, cells: list[Cell], colours: dict[str, str]) -> Iterable[str]:
    if not cells:
        return
    downtimes = {cell: max(report.spread(cell, lambda run: run.downtime_ms).median, 0.1) for cell in cells}
    sizes = sorted({cell[2] for cell in cells})
    low, high = math.floor(math.log10(min(downtimes.values()))), math.ceil(math.log10(max(downtimes.values())) + 1e-9)
    high = max(high, low + 1)
    step = (_WIDTH - _LEFT - _RIGHT) / max(math.log2(sizes[-1] / sizes[0]), 1)

    def x(size: int) -> float:
        return _LEFT + math.log2(size / sizes[0]) * step

    def y(downtime: float) -> float:
        return _HEIGHT - _BOTTOM - (math.log10(downtime) - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    yield _text(_LEFT, 22, "Guest downtime over memory, all of it touched", "start", bold=True)
    for power in range(low, high + 1):
        level = y(10**power)
        yield f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{level:.1f}" y2="{level:.1f}" stroke="#ddd"/>'
        yield _text(_LEFT - 8, level + 4, f"{10**power:g} ms", "end")
    for size in sizes:
        yield _text(x(size), _HEIGHT - _BOTTOM + 20, memory(size), "middle")
    ends: dict[str, float] = {}
    for mode, colour in colours.items():
        points = sorted((cell[2], downtime) for cell, downtime in downtimes.items() if cell[1] == mode)
        path = " ".join(f"{x(size):.1f},{y(downtime):.1f}" for size, downtime in points)
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
        for size, downtime in points:
            yield f'<circle cx="{x(size):.1f}" cy="{y(downtime):.1f}" r="3.5" fill="{colour}"/>'
        ends[mode] = y(points[-1][1]) + 4
    below = 0.0
    for mode in sorted(ends, key=lambda mode: ends[mode]):
        # Curves may end in one place; their labels must not overlap.
        below = max(ends[mode], below + _LINE)
        yield _text(_WIDTH - _RIGHT + 12, below, mode, "start", colours[mode])


def _bars(report: Report) -> list[tuple[str, dict[str, float]]]:
    found = []
    for mode in dict.fromkeys(ours for ours, _ in PAIRS):
        for cell in sorted(cell for cell in report.compared() if cell[1] == mode):
            stopped = {name: ms for name, ms in report.phases(cell).items() if name in _STOPPED[mode]}
            if stopped:
                found.append((f"{mode}, {memory(cell[2])}", stopped))
    return found


def _breakdown(bars: list[tuple[str, dict[str, float]]]) -> Iterable[str]:
    if not bars:
        return
    yield _text(_LEFT, _HEIGHT + 20, "The phases of sevhop's downtime", "start", bold=True)
    names = list(dict.fromkeys(name for _, phases in bars for name in phases))
    left, width = _LEFT + 70, _WIDTH - _LEFT - 70 - 110
    for n, (label, phases) in enumerate(bars):
        top, whole, at = _HEIGHT + 34 + 34 * n, sum(phases.values()) or 1.0, float(left)
        yield _text(left - 8, top + 15, label, "end")
        for name, ms in phases.items():
            part = ms / whole * width
            colour = _COLOURS[names.index(name) % len(_COLOURS)]
            yield f'<rect x="{at:.1f}" y="{top}" width="{part:.1f}" height="22" fill="{colour}">'
            yield f"<title>{escape(name)}: {ms:.1f} ms</title></rect>"
            if part > 45:
                yield _text(at + part / 2, top + 15, f"{name} {ms:.0f}", "middle", "white")
            at += part
        yield _text(left + width + 8, top + 15, f"{whole:.0f} ms", "start")


def _text(x: float, y: float, text: str, anchor: str, colour: str = "black", *, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"{weight}>{escape(text)}</text>'
