"""
The program of ``tools/demo``: guests hop between two QEMU versions, by ``sevhop hop``.

The SEV-ES guest, Linux as well, hops on this machine if it has SEV-ES, and otherwise in the SEV lab (``tools/lab``),
where this program runs again, for that guest only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.support.guests import counter, emulators, linux
from tests.support.guests.isolation import isolate
from tests.support.guests.judge import Verdict
from tests.support.guests.machine import Accelerator, Machine
from tests.support.guests.running import Guest, GuestFailed

#: Numbers that a guest must count before and after each hop.
_TICKS = 10
#: Seconds until it must have done so. In the lab Linux boots for minutes.
_PATIENCE = 900.0
#: Seconds between two lines of progress.
_PROGRESS = 20.0
#: No debugging, and encrypted registers (SEV API specification, "guest policy").
_SEV_ES_POLICY = 1 | 1 << 2


@dataclass(frozen=True)
class Shown:
    """The result of a hop. ``ticks_lost``, ``ticks_repeated`` and ``disk_errors`` are counted by the guest."""

    guest: str
    context: str
    source: str
    destination: str
    downtime_ms: float | None
    ticks_lost: int
    ticks_repeated: int
    disk_errors: int
    outcome: str
    reason: str = ""
    move_errno: int | None = None
    where: str = "this machine"

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

    @classmethod
    def from_json(cls, hop: dict[str, Any], where: str) -> Self:
        """Parse the output of another run of this program."""
        versions = {side: hop[side]["version"] for side in ("source", "destination")}
        return cls(**{**hop, **versions, "where": where})


def say(text: str) -> None:
    """Print progress to standard error, so that ``--json`` prints nothing else."""
    print(f"demo: {text}", file=sys.stderr, flush=True)


def sevhop_hop(guest: Guest, emulator: Path) -> dict[str, Any]:
    """Run ``sevhop hop --json``, with long timeouts for the lab."""
    command = [sys.executable, "-m", "sevhop.cli", "hop", "--json", "--timeout", "60", "--start-timeout", "120"]
    command += ["--qmp", str(guest.machine.monitor), "--emulator", str(emulator)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def wait_for_ticks(name: str, guest: Guest) -> Verdict:
    """Wait until a guest has counted on, and print progress meanwhile."""
    begin = time.monotonic()
    wanted = guest.seen().ticks + _TICKS
    while True:
        missing = wanted - guest.seen().ticks
        try:
            return guest.wait_for_ticks(max(missing, 1), timeout=_PROGRESS)
        except GuestFailed:
            waited = time.monotonic() - begin
            if waited > _PATIENCE:
                raise
            say(f"{name}: {'counts' if guest.seen().ticks else 'boots'}, for {waited:.0f} s")


def hops_of(name: str, machine: Machine, old: Path, new: Path) -> Iterator[Shown]:
    """Start a guest in the old QEMU, hop it to the new one and back, and verify it."""
    say(f"{name}: starting")
    with Guest.start(machine, old) as guest:
        before = wait_for_ticks(name, guest)
        shown: list[tuple[dict[str, Any], Verdict, Verdict]] = []
        for emulator in (new, old):
            report = sevhop_hop(guest, emulator)
            say(f"{name}: {report['outcome']} {report['reason']}".rstrip())
            after = wait_for_ticks(name, guest)
            shown.append((report, before, after))
            before = after
        last = guest.stop()  # verifies the disk, too
    for number, (report, start, end) in enumerate(shown, 1):
        end = last if number == len(shown) else end
        yield Shown(
            name,
            report["context"],
            report["source"]["version"],
            report["destination"]["version"],
            report["downtime_ms"],
            end.ticks_lost - start.ticks_lost,
            end.ticks_repeated + end.restarts - start.ticks_repeated - start.restarts,
            end.disk_errors - start.disk_errors,
            report["outcome"],
            report["reason"],
            report["move"]["errno"] if report["move"] else None,
        )


def _host_has_sev_es() -> bool:
    parameter = Path("/sys/module/kvm_amd/parameters/sev_es")
    return Path("/dev/sev").exists() and parameter.exists() and parameter.read_text().strip() in ("Y", "1")


def _sev_es_hops(directory: Path, old: Path, new: Path) -> Iterator[Shown]:
    """Linux with SEV-ES, with the parameters of this processor."""
    # A named model: with "host" the newer QEMU adds features, which the older one lacks on the way back.
    plain = Machine(directory / "capabilities", accelerator="kvm", cpu="EPYC")
    with Guest.start(plain, old) as guest:
        processor = guest.execute("query-sev-capabilities")
    machine = dataclasses.replace(
        plain,
        directory=directory / "sev-es",
        sev_policy=_SEV_ES_POLICY,
        c_bit=processor["cbitpos"],
        reduced_phys_bits=processor["reduced-phys-bits"],
    )
    return hops_of("Linux, SEV-ES", linux.on(machine), old, new)


def _encrypted_hops(directory: Path, old: Path, new: Path) -> list[Shown]:
    if _host_has_sev_es():
        return list(_sev_es_hops(directory, old, new))
    say("this machine has no SEV-ES: that guest hops in the lab, where it boots for some minutes")
    linux.images()  # there is no network in the lab
    root = Path(__file__).resolve().parent.parent
    inside = ["env", f"PYTHONPATH={root}:{root / 'tools'}", sys.executable, "-m", "demonstration", "--json", "--sev-es"]
    lab = [str(root / "tools/lab/run"), "--timeout", "3600", "--show", sys.prefix, *inside]
    done = subprocess.run(lab, cwd=root, stdout=subprocess.PIPE, check=False)
    try:
        report = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise SystemExit(f"demo: the lab exited with {done.returncode}: {done.stdout[-500:]!r}") from None
    return [Shown.from_json(hop, "the SEV lab") for hop in report["hops"]]


def _accelerator(directory: Path, emulator: Path) -> Accelerator:
    """KVM if a guest runs under it."""
    try:
        machine = Machine(directory, accelerator="kvm", bios=counter.firmware())
        with Guest.start(machine, emulator) as guest:
            guest.wait_for_ticks(3, timeout=10)
    except GuestFailed:
        return "tcg"
    return "kvm"


def _table(hops: list[Shown]) -> str:
    rows = [("guest", "context", "on", "hop", "downtime", "ticks lost", "repeated", "disk errors", "outcome")]
    for hop in hops:
        downtime = "-" if hop.downtime_ms is None else f"{hop.downtime_ms:.1f} ms"
        way = f"{hop.source} -> {hop.destination}"
        counts = (str(hop.ticks_lost), str(hop.ticks_repeated), str(hop.disk_errors))
        rows.append((hop.guest, hop.context, hop.where, way, downtime, *counts, hop.outcome))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def main() -> int:
    """Hop the guests, and print the results."""
    parser = argparse.ArgumentParser(prog="tools/demo", description="Hop guests between two QEMU versions.")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--sev-es", action="store_true", help="only the SEV-ES guest; this machine must have SEV-ES")
    options = parser.parse_args()
    isolate()
    old, new = emulators.emulator(emulators.OLD), emulators.emulator(emulators.NEW)
    hops: list[Shown] = []
    with tempfile.TemporaryDirectory(prefix="sevhop-demo-") as scratch:
        directory = Path(scratch)
        if options.sev_es:
            hops += _sev_es_hops(directory, old, new)
        else:
            accelerator = _accelerator(directory / "probe", old)
            say(f"bare-metal guests run under {accelerator.upper()}")
            machine = Machine(directory / "counter", accelerator=accelerator, bios=counter.firmware(), rich=True)
            hops += hops_of("bare-metal counter", machine, old, new)
            hops += hops_of("Linux", linux.on(Machine(directory / "linux")), old, new)
            hops += _encrypted_hops(directory, old, new)
    print(json.dumps({"hops": [hop.as_json() for hop in hops]}) if options.json else _table(hops))
    return 0 if all(hop.good for hop in hops) else 1


if __name__ == "__main__":
    sys.exit(main())
