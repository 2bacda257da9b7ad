"""
The table of faults: at which step of a hop what was killed, and what became of the guest.

Tests of faults fill it in (fixture ``note_fault``), in the SEV lab as well; ``pytest --fault-table FILE`` writes it
down as Markdown.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tests.support.guests.judge import Verdict

#: How a column is headed, by the kind of fault.
COLUMNS = {
    "command": "command killed",
    "source": "source killed",
    "destination": "destination killed",
    "stall": "old QEMU hangs",
    "hang": "new QEMU hangs",
    "keeper": "keeper killed",
    "hook": "hook killed",
    "daemon": "libvirtd killed",
    "error": "step refused",
    "silence": "no answer",
    "room": "disk full",
}
_END = {"source": "old QEMU", "destination": "new QEMU"}


@dataclass(frozen=True)
class Cell:
    """What one fault at one step came to: the end, and the ticks that the guest lost or counted twice."""

    end: str
    ticks_lost: int
    ticks_repeated: int

    @classmethod
    def running(cls, end: str, verdict: Verdict, remark: str = "") -> Cell:
        """The guest runs in the ``source`` or the ``destination``."""
        return cls(_END[end] + f" ({remark})" * bool(remark), verdict.ticks_lost, verdict.ticks_repeated)

    def __str__(self) -> str:
        harm = f", {self.ticks_lost} lost" * bool(self.ticks_lost)
        return self.end + harm + f", {self.ticks_repeated} repeated" * bool(self.ticks_repeated)


@dataclass
class FaultTable:
    """Rows by path (outside libvirt, or a domain) and step, columns by kind of fault."""

    cells: dict[str, dict[str, dict[str, Cell]]] = field(default_factory=dict)

    def add(self, path: str, step: str, fault: str, cell: Cell) -> None:
        """Note one result."""
        self.cells.setdefault(path, {}).setdefault(step, {})[fault] = cell

    def write(self, file: Path) -> None:
        """Write the table."""
        lines: list[str] = []
        for path, rows in self.cells.items():
            faults = [fault for fault in COLUMNS if any(fault in row for row in rows.values())]
            heads = [COLUMNS[fault] for fault in faults]
            lines += [f"## {path}", "", f"| step | {' | '.join(heads)} |", "|---" * (len(faults) + 1) + "|"]
            for step, row in rows.items():
                lines.append(f"| {step} | {' | '.join(str(row.get(fault, '')) for fault in faults)} |")
            lines.append("")
        file.write_text("\n".join(lines))
