"""The command ``tools/bench/run``: its arguments, measurements and output."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from sevhop_qmp.errors import SevhopError

from tests.support.guests import counter, emulators
from tests.support.guests.build import CACHE, BuildFailed, Unavailable
from tests.support.guests.ending import end_in_order
from tests.support.guests.isolation import isolate
from tests.support.guests.machine import Accelerator, Machine
from tests.support.guests.running import Guest, GuestFailed

from .domains import Domains
from .picture import svg
from .report import Failed, Report, Run
from .standalone import MODES, SELDOM, Standalone
from .usage import Usage

#: MiB of guest memory.
_SIZES = [256, 1024, 4096, 8192]
_QUICK_SIZES = [256]
#: MiB of free memory that is left to other processes.
_SPARE = 2048
_PARTS = ["standalone", "domains"]
_KINDS = ["minimal", "rich"]


def say(text: str) -> None:
    """Print a line of progress."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def _accelerator(directory: Path) -> Accelerator:
    """KVM if a guest runs under it."""
    try:
        machine = Machine(directory, accelerator="kvm", bios=counter.firmware())
        with Guest.start(machine, emulators.installed()) as guest:
            guest.wait_for_ticks(3, timeout=10)
    except GuestFailed:
        return "tcg"
    return "kvm"


def _about(accelerator: Accelerator) -> dict[str, str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if "model name" in line), platform.machine())
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": f"{os.cpu_count()} x {cpu}",
        "kernel": platform.release(),
        "guests run under": accelerator.upper(),
        "load at the beginning": " ".join(f"{load:.1f}" for load in os.getloadavg()),
    }


def measure(options: argparse.Namespace, scratch: Path, usage: Usage | None) -> Report:
    """Measure all that was requested; if a signal terminates it, report what was measured until then."""
    accelerator = _accelerator(scratch / "probe")
    about = _about(accelerator)
    runs: list[Run] = []
    failures: list[Failed] = []
    foreign: list[float] = []

    def take(found: Iterable[Run | Failed]) -> None:
        for one in found:
            if isinstance(one, Run):
                say(f"{one.machine} {one.mode} {one.memory_mib} MiB: {one.downtime_ms:.1f} ms")
                runs.append(one)
            else:
                say(str(one))
                failures.append(one)

    sizes = [size for size in options.sizes if _fits(size)]
    try:
        if not sizes:
            raise GuestFailed("not enough free memory for any of the sizes")
        if "standalone" in options.only:
            standalone = Standalone(emulators.emulator(emulators.NEW), accelerator, scratch, options.images, usage)
            for kind in options.machines:
                for size in sizes:
                    take(standalone.measure(kind, size, options.rounds, options.modes))
        if "domains" in options.only:
            with Domains(accelerator, options.images, usage) as domains:
                foreign += domains.hook_of_a_foreign_domain()
                for size in sizes:
                    # A round has both directions, and takes long.
                    take(domains.measure(size, -(-options.rounds // SELDOM)))
    except SystemExit:
        failures.append(Failed("all other runs", "", 0, "terminated by a signal"))
    except (GuestFailed, Unavailable, BuildFailed, SevhopError, OSError) as err:
        failures.append(Failed("all other runs", "", 0, str(err)))
    return Report(runs, about, foreign, failures)


def _fits(size: int) -> bool:
    """Whether there is memory for two copies of the guest's, as migration needs; otherwise the host would swap."""
    available = int(re.findall(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())[0]) >> 10
    if 2 * size + _SPARE <= available:
        return True
    say(f"skipped {size} MiB: only {available} MiB of memory are available")
    return False


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="tools/bench/run", description="Guest downtime when its QEMU is replaced, side by side."
    )
    parser.add_argument("--quick", action="store_true", help="the smallest memory, a minimal machine, one round")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument(
        "--only", type=_names, default=_PARTS, metavar="PART,...", help="standalone, domains (default: both)"
    )
    modes = list(MODES)
    parser.add_argument(
        "--modes", type=_names, default=modes, metavar="MODE,...", help=f"standalone: {', '.join(modes)}"
    )
    parser.add_argument("--machines", type=_names, metavar="KIND,...", help="standalone: minimal, rich (default: both)")
    parser.add_argument("--sizes", type=_sizes, metavar="MIB,...", help="guest memory (default: 256,1024,4096,8192)")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds with each size (default: 9)")
    parser.add_argument("--images", type=Path, default=CACHE, metavar="DIRECTORY", help="directory for save images")
    parser.add_argument("--output", type=Path, metavar="DIRECTORY", help="write bench.md, bench.json, bench.svg there")
    options = parser.parse_args()
    options.sizes = options.sizes or (_QUICK_SIZES if options.quick else _SIZES)
    options.machines = options.machines or (_KINDS[:1] if options.quick else _KINDS)
    options.rounds = options.rounds or (1 if options.quick else 9)
    if wrong := sorted({*options.only, *options.machines, *options.modes}.difference(_PARTS, _KINDS, MODES)):
        parser.error(f"unknown: {', '.join(wrong)}")
    end_in_order()
    isolate()
    try:
        with contextlib.ExitStack() as resources:
            scratch = resources.enter_context(tempfile.TemporaryDirectory(prefix="sevhop-bench-"))
            usage = None
            try:
                usage = resources.enter_context(Usage())
            except OSError as err:
                say(f"cannot count processor time and memory: {err}")
            report = measure(options, Path(scratch), usage)
    except (GuestFailed, Unavailable) as err:
        say(str(err))
        return 1
    text = json.dumps(report.as_json(), indent=2)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "bench.json").write_text(text + "\n")
        (options.output / "bench.md").write_text(report.markdown())
        (options.output / "bench.svg").write_text(svg(report))
    print(text if options.json else report.markdown().rstrip())
    for failed in report.failures:
        say(f"failed: {failed}")
    return 1 if report.failures else 0


def _names(text: str) -> list[str]:
    return text.split(",")


def _sizes(text: str) -> list[int]:
    sizes = [int(size) for size in text.split(",")]
    if min(sizes) < counter.MEMORY_MIB:
        raise ValueError(f"the guest needs {counter.MEMORY_MIB} MiB")
    return sizes


if __name__ == "__main__":
    sys.exit(main())
