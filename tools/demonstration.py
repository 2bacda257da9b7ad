"""What ``tools/demo`` shows: guests that hop between two QEMU versions, by the product's own command."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from guests import counter, emulators, linux
from guests.judge import Verdict
from guests.machine import Accelerator, Machine
from guests.running import Guest, GuestFailed

#: Numbers that a guest must count before and after each hop.
_TICKS = 10


@dataclass(frozen=True)
class Shown:
    """A hop as it is shown. ``ticks_lost``, ``ticks_repeated`` and ``disk_errors`` are the guest's own verdict."""

    guest: str
    context: str
    source: str
    destination: str
    blackout_ms: float | None
    ticks_lost: int
    ticks_repeated: int
    disk_errors: int
    outcome: str
    reason: str = ""

    @property
    def good(self) -> bool:
        """Whether the guest arrived and lost nothing."""
        return self.outcome == "done" and not (self.ticks_lost or self.ticks_repeated or self.disk_errors)

    def as_json(self) -> dict[str, object]:
        """For ``--json``."""
        return {
            **dataclasses.asdict(self),
            "source": {"version": self.source},
            "destination": {"version": self.destination},
        }


def say(text: str) -> None:
    """Progress goes to standard error, so that ``--json`` prints nothing else."""
    print(f"demo: {text}", file=sys.stderr, flush=True)


def sevhop_hop(guest: Guest, emulator: Path) -> dict[str, object]:
    """``sevhop hop --json``, as anybody would call it."""
    command = [sys.executable, "-m", "sevhop.cli", "hop", "--json"]
    command += ["--source", str(guest.machine.monitor), "--emulator", str(emulator)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    report: dict[str, object] = json.loads(done.stdout)
    return report


def hops_of(name: str, machine: Machine, old: Path, new: Path) -> Iterator[Shown]:
    """Start a guest in the old QEMU, hop it to the new one and back, and judge it."""
    say(f"{name}: starting it")
    with Guest.start(machine, old) as guest:
        before = guest.wait_for_ticks(_TICKS, timeout=120)
        shown: list[tuple[dict[str, object], Verdict, Verdict]] = []
        for emulator in (new, old):
            report = sevhop_hop(guest, emulator)
            say(f"{name}: {report['outcome']} {report['reason']}".rstrip())
            after = guest.wait_for_ticks(_TICKS, timeout=120)
            shown.append((report, before, after))
            before = after
        last = guest.stop()  # looks into the disk, too
    for number, (report, start, end) in enumerate(shown, 1):
        end = last if number == len(shown) else end
        yield Shown(
            name,
            str(report["context"]),
            _version(report["source"]),
            _version(report["destination"]),
            report["blackout_ms"] if isinstance(report["blackout_ms"], float) else None,
            end.ticks_lost - start.ticks_lost,
            end.ticks_repeated + end.restarts - start.ticks_repeated - start.restarts,
            end.disk_errors - start.disk_errors,
            str(report["outcome"]),
            str(report["reason"]),
        )


def _version(side: object) -> str:
    return str(side["version"]) if isinstance(side, dict) else ""


def _accelerator(directory: Path, emulator: Path) -> Accelerator:
    """KVM if a guest really runs under it."""
    try:
        machine = Machine(directory, accelerator="kvm", bios=counter.firmware())
        with Guest.start(machine, emulator) as guest:
            guest.wait_for_ticks(3, timeout=10)
    except GuestFailed:
        return "tcg"
    return "kvm"


def _table(hops: list[Shown]) -> str:
    rows = [("guest", "context", "hop", "blackout", "ticks lost", "repeated", "disk errors", "outcome")]
    for hop in hops:
        blackout = "-" if hop.blackout_ms is None else f"{hop.blackout_ms:.1f} ms"
        way = f"{hop.source} -> {hop.destination}"
        counts = (str(hop.ticks_lost), str(hop.ticks_repeated), str(hop.disk_errors))
        rows.append((hop.guest, hop.context, way, blackout, *counts, hop.outcome))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def main() -> int:
    """Hop, and print what became of it."""
    parser = argparse.ArgumentParser(prog="tools/demo", description="See guests hop between two QEMU versions.")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args()
    old, new = emulators.emulator(emulators.OLD), emulators.emulator(emulators.NEW)
    hops: list[Shown] = []
    with tempfile.TemporaryDirectory(prefix="sevhop-demo-") as scratch:
        directory = Path(scratch)
        accelerator = _accelerator(directory / "probe", old)
        say(f"bare-metal guests run under {accelerator.upper()}")
        bare = Machine(directory / "counter", accelerator=accelerator, bios=counter.firmware(), rich=True)
        hops += hops_of("bare-metal counter", bare, old, new)
        hops += hops_of("Linux", linux.on(Machine(directory / "linux")), old, new)
    print(json.dumps({"hops": [hop.as_json() for hop in hops]}) if options.json else _table(hops))
    return 0 if all(hop.good for hop in hops) else 1


if __name__ == "__main__":
    sys.exit(main())
