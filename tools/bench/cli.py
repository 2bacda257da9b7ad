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
import time
from collections.abc import Iterable
from pathlib import Path

from sevhop_qmp.errors import SevhopError

from tests.support.guests import counter, emulators
from tests.support.guests.build import CACHE, BuildFailed, Unavailable
from tests.support.guests.ending import end_in_order
from tests.support.guests.isolation import isolate
from tests.support.guests.machine import Accelerator, Machine
from tests.support.guests.running import Guest, GuestFailed

from . import domains, standalone
from .domains import Domains
from .hops import Hops
from .machines import KINDS
from .picture import svg
from .report import Report
from .runs import Failed, Run
from .standalone import SLOW, Standalone
from .usage import Usage
from .ways import HOP, Pinged

#: MiB of guest memory.
_SIZES = [256, 1024, 4096, 8192]
_QUICK_SIZES = [256]
#: MiB of free memory that is left to other processes.
_SPARE = 2048
_STANDALONE, _DOMAINS, _BUSY, _PINGS = _PARTS = ("standalone", "domains", "busy", "pings")
_QUICK_PARTS = (_STANDALONE, _DOMAINS)
_MODES = tuple(dict.fromkeys((*standalone.MODES, *domains.MODES)))


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


class Measurement:
    """
    All that was requested is measured, one after the other.

    :param scratch: directory for files of guests.
    """

    def __init__(
        self, options: argparse.Namespace, accelerator: Accelerator, scratch: Path, usage: Usage | None
    ) -> None:
        self._options = options
        self._accelerator = accelerator
        self._scratch = scratch
        self._usage = usage
        self.runs: list[Run] = []
        self.pings: list[Pinged] = []
        self.failures: list[Failed] = []
        self.foreign_hook_ms: list[float] = []

    def run(self) -> None:
        """Measure; if a signal terminates it, what was measured until then is kept."""
        try:
            if _STANDALONE in self._options.only:
                self._standalone()
            if {_DOMAINS, _BUSY, _PINGS}.intersection(self._options.only):
                with Domains(self._accelerator, self._options.images, self._usage) as there:
                    self._domains(there)
        except SystemExit:
            self.failures.append(Failed("all other runs", "", 0, "terminated by a signal"))
        except (GuestFailed, Unavailable, BuildFailed, SevhopError, OSError) as err:
            self.failures.append(Failed("all other runs", "", 0, str(err)))

    def _standalone(self) -> None:
        options = self._options
        modes = [mode for mode in options.modes if mode in standalone.MODES]
        emulator = emulators.emulator(emulators.NEW)
        there = Standalone(emulator, self._accelerator, self._scratch, options.images, self._usage)
        # Migration has two copies of the memory.
        sizes = _fitting(options.sizes, 2 if set(modes).intersection(SLOW) else 1)
        for kind in options.machines:
            for size in sizes:
                self._take(there.measure(kind, size, options.rounds, modes))

    def _domains(self, there: Domains) -> None:
        options = self._options
        hops = Hops(self._accelerator, self._scratch, self._usage)
        modes = [mode for mode in options.modes if mode in domains.MODES]
        upgrades = [mode for mode in modes if mode in domains.UPGRADES]
        rounds = -(-options.rounds // 2)  # each has both directions
        if _DOMAINS in options.only:
            self.foreign_hook_ms += there.hook_of_a_foreign_domain()
        for size in _fitting(options.sizes, 1):
            hosts = [False] if _DOMAINS in options.only else []
            hosts += [True] if _BUSY in options.only and size in (options.busy_sizes or options.sizes) else []
            for kind in options.machines:
                if modes and hosts:
                    self._take(there.measure(kind, size, rounds, modes, hosts))
                if HOP in options.modes and hosts:
                    self._take(hops.measure(kind, size, rounds, hosts))
                if upgrades and _PINGS in options.only and size in (options.ping_sizes or options.sizes):
                    self._take(there.ping(kind, size, rounds, upgrades))

    def _take(self, found: Iterable[Run | Pinged | Failed]) -> None:
        for one in found:
            if isinstance(one, Failed):
                say(str(one))
                self.failures.append(one)
                continue
            text = f"{one.machine} {one.mode} {one.memory_mib} MiB"
            if isinstance(one, Pinged):
                say(f"{text}: {one.lost} of {one.sent} pings lost, {one.reported_ms:.1f} ms")
                self.pings.append(one)
            else:
                reported = "" if one.reported_ms is None else f", reported {one.reported_ms:.1f}"
                say(f"{text}{', busy host' if one.busy else ''}: {one.downtime_ms:.1f} ms{reported}")
                self.runs.append(one)


def _fitting(sizes: list[int], copies: int) -> list[int]:
    """
    Those for which there is memory; with others the host would swap.

    :param copies: of the guest's memory.
    :raises GuestFailed: there is none.
    """
    available = int(re.findall(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())[0]) >> 10
    fitting = [size for size in sizes if copies * size + _SPARE <= available]
    for size in sizes:
        if size not in fitting:
            say(f"skipped {size} MiB: only {available} MiB of memory are available")
    if not fitting:
        raise GuestFailed("not enough free memory for any of the sizes")
    return fitting


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="tools/bench/run", description="Guest downtime when its QEMU is replaced, side by side."
    )
    parser.add_argument("--quick", action="store_true", help="the smallest memory, a minimal machine, one round")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument(
        "--only", type=_names, metavar="PART,...", help=f"{', '.join(_PARTS)} (default: all); see docs/performance.md"
    )
    parser.add_argument("--modes", type=_names, default=_MODES, metavar="MODE,...", help=", ".join(_MODES))
    parser.add_argument("--machines", type=_names, metavar="KIND,...", help=f"{', '.join(KINDS)} (default: both)")
    parser.add_argument("--sizes", type=_sizes, metavar="MIB,...", help="guest memory (default: 256,1024,4096,8192)")
    for part in (_BUSY, _PINGS):
        name = f"--{part.removesuffix('s')}-sizes"
        parser.add_argument(name, type=_sizes, metavar="MIB,...", help=f"those of the sizes for {part} (default: all)")
    parser.add_argument(
        "--rounds",
        type=int,
        metavar="N",
        help="runs of each mode with each size (default: 9); of upgrades an even number",
    )
    parser.add_argument("--images", type=Path, default=CACHE, metavar="DIRECTORY", help="directory for save images")
    parser.add_argument("--output", type=Path, metavar="DIRECTORY", help="write bench.md, bench.json, bench.svg there")
    options = parser.parse_args()
    options.sizes = options.sizes or (_QUICK_SIZES if options.quick else _SIZES)
    options.machines = options.machines or (KINDS[:1] if options.quick else KINDS)
    options.only = options.only or (_QUICK_PARTS if options.quick else _PARTS)
    options.rounds = options.rounds or (1 if options.quick else 9)
    if wrong := sorted({*options.only, *options.machines, *options.modes}.difference(_PARTS, KINDS, _MODES)):
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
            accelerator = _accelerator(Path(scratch, "probe"))
            about = _about(accelerator)
            found = Measurement(options, accelerator, Path(scratch), usage)
            began = time.monotonic()
            found.run()
            about["took"] = f"{(time.monotonic() - began) / 60:.1f} minutes"
            report = Report(found.runs, about, found.foreign_hook_ms, found.failures, found.pings)
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
