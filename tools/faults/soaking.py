"""
What ``tools/soak`` runs: a guest that works, hopping to and fro between two QEMUs, with faults at random points.

The guest writes its disk, pings and checks its memory, and counts; see :mod:`guests.judge`. After every hop, broken off
or not, ``sevhop recover`` runs, and the guest must go on in exactly one QEMU. A fault that ends any guest, since it
kills the QEMU that has it, is not chosen.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guests import emulators, linux
from guests.machine import Machine
from guests.running import Guest, GuestFailed, processes_of
from sevhop import journal
from sevhop.run_directory import RUN

from .broken_hop import BEFORE_THE_STATE_IS_SAVED, RUNNING, SAVED

_POINTS = (*BEFORE_THE_STATE_IS_SAVED, *SAVED, *RUNNING)
#: Ticks that the guest must count on after each hop.
_TICKS = 2


def faults() -> list[tuple[str, str]]:
    """All (point, fault) that a guest survives."""
    found = [(point, "command") for point in _POINTS]
    found += [(point, "destination") for point in (*BEFORE_THE_STATE_IS_SAVED, *SAVED)]
    found += [(point, "source") for point in (*SAVED, *RUNNING)]
    found += [(point, fault) for point in _POINTS if point.startswith("before ") for fault in ("error", "silence")]
    return found


@dataclass
class Soaked:
    """
    What has come of it.

    :ivar steps: faults by point and kind.
    :ivar ends: hops by exit status of the command; -9 is a command that was killed.
    :ivar leaks: what was left behind or has grown, in words.
    """

    path: str
    seed: int
    hops: int = 0
    faults: int = 0
    ticks: int = 0
    ticks_lost: int = 0
    ticks_repeated: int = 0
    disk_errors: int = 0
    memory_errors: int = 0
    network_errors: int = 0
    seconds: float = 0.0
    steps: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    leaks: list[str] = field(default_factory=list)
    failure: str = ""

    @property
    def good(self) -> bool:
        """Whether nothing was lost and nothing was left."""
        harm = self.ticks_lost + self.ticks_repeated + self.disk_errors + self.memory_errors + self.network_errors
        return not (harm or self.leaks or self.failure)

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "path": self.path,
            "seed": self.seed,
            "hops": self.hops,
            "faults": self.faults,
            "ticks": self.ticks,
            "ticks_lost": self.ticks_lost,
            "ticks_repeated": self.ticks_repeated,
            "disk_errors": self.disk_errors,
            "memory_errors": self.memory_errors,
            "network_errors": self.network_errors,
            "leaks": self.leaks,
            "failure": self.failure,
            "seconds": round(self.seconds),
            "ends": dict(sorted(self.ends.items())),
            "steps": dict(sorted(self.steps.items())),
        }

    def __str__(self) -> str:
        harm = f"ticks lost {self.ticks_lost}, repeated {self.ticks_repeated}, disk errors {self.disk_errors}, "
        harm += f"memory errors {self.memory_errors}, network errors {self.network_errors}, leaks {len(self.leaks)}"
        lines = [f"{self.path}, seed {self.seed}: {self.hops} hops, {self.faults} faults, {self.ticks} ticks; {harm}"]
        lines += [f"  {count:5} {step}" for step, count in sorted(self.steps.items())]
        lines += [f"leak: {leak}" for leak in self.leaks] + ([f"failed: {self.failure}"] if self.failure else [])
        return "\n".join(lines)


def say(text: str) -> None:
    """Progress goes to standard error."""
    print(f"soak: {text}", file=sys.stderr, flush=True)


class Soak:
    """Hops of one guest."""

    def __init__(self, soaked: Soaked, guest: Guest, share: float, old: Path, new: Path) -> None:
        self._soaked = soaked
        self._guest = guest
        self._random = random.Random(soaked.seed)
        self._share = share
        self._emulators = {old.resolve(): new, new.resolve(): old}
        self._descriptors: dict[Path, int] = {}

    def hop(self) -> None:
        """
        Hop once.

        :raises SoakFailed: the guest did not come out of it, or there are several of it.
        """
        soaked, guest = self._soaked, self._guest
        point, fault = ("phase check", "none")
        if self._random.random() < self._share:
            point, fault = self._random.choice(faults())
            soaked.faults += 1
            soaked.steps[f"{fault} {point}"] += 1
        emulator = self._emulators[Path(os.readlink(f"/proc/{guest.pid}/exe"))]
        command = [sys.executable, "-m", "faults.broken_hop", str(guest.machine.monitor), str(emulator), point, fault]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        soaked.hops += 1
        soaked.ends[str(done.returncode)] += 1
        recovered = subprocess.run(
            [sys.executable, "-m", "sevhop.cli", "recover"], capture_output=True, text=True, timeout=600, check=False
        )
        what = f"hop {soaked.hops} ({fault} at {point}): {done.stdout.strip()} {done.stderr.strip()[-500:]}"
        if recovered.returncode or (fault == "none" and done.returncode):
            raise SoakFailed(f"{what}; recover: {recovered.stdout.strip()} {recovered.stderr.strip()[-500:]}")
        if len(processes_of(guest.machine.directory)) != 1:
            raise SoakFailed(f"{what}: processes {processes_of(guest.machine.directory)}")
        try:
            guest.wait_for_ticks(_TICKS)
        except GuestFailed as err:
            raise SoakFailed(f"{what}: {err}") from err
        self._look_for_leaks()

    def _look_for_leaks(self) -> None:
        left = [str(path) for path in (*journal.journals(), *(RUN.iterdir() if RUN.exists() else ()))]
        if left := [path for path in left if not path.endswith("/domains")]:
            raise SoakFailed(f"left behind: {', '.join(left)}")
        pid = self._guest.pid
        count = len(os.listdir(f"/proc/{pid}/fd"))
        first = self._descriptors.setdefault(Path(os.readlink(f"/proc/{pid}/exe")), count)
        # A connection of ours may be just being closed.
        if count > first + 2:
            self._soaked.leaks.append(f"hop {self._soaked.hops}: {count} descriptors in QEMU, {first} in the beginning")


class SoakFailed(Exception):
    """A guest did not come out of a hop, or something was left behind."""


def soak(soaked: Soaked, hops: int, minutes: float, share: float) -> None:
    """Hop until there have been so many, or so many minutes are over, or something went wrong."""
    old, new = emulators.emulator(emulators.OLD), emulators.emulator(emulators.NEW)
    began = time.monotonic()
    shm = set(os.listdir("/dev/shm"))
    with tempfile.TemporaryDirectory(prefix="sevhop-soak-") as scratch:
        machine = linux.on(Machine(Path(scratch, "guest"), rich=True))
        with Guest.start(machine, old) as guest:
            guest.wait_for_ticks(_TICKS)
            run = Soak(soaked, guest, share, old, new)
            try:
                while soaked.hops < hops and time.monotonic() - began < minutes * 60:
                    run.hop()
                    if soaked.hops % 25 == 0:
                        say(f"{soaked.hops} hops, {soaked.faults} faults, {guest.seen().ticks} ticks")
            except SoakFailed as err:
                soaked.failure = str(err)
                say(soaked.failure)
            try:
                verdict = guest.stop()  # looks into the disk, too
            except GuestFailed as err:
                soaked.failure = soaked.failure or str(err)
                verdict = guest.seen()
        soaked.ticks, soaked.ticks_lost, soaked.ticks_repeated = (
            verdict.ticks,
            verdict.ticks_lost,
            verdict.ticks_repeated + verdict.restarts,
        )
        soaked.disk_errors, soaked.memory_errors = verdict.disk_errors, verdict.memory_errors
        soaked.network_errors = verdict.network_errors
    soaked.leaks += [f"/dev/shm/{name}" for name in set(os.listdir("/dev/shm")) - shm]
    soaked.seconds = time.monotonic() - began


def main() -> int:
    """Hop, and print what became of it."""
    parser = argparse.ArgumentParser(prog="tools/soak", description="Hop a guest again and again, with random faults.")
    parser.add_argument("--hops", type=int, default=1000, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32), metavar="S", help="of all choices")
    parser.add_argument(
        "--faults", type=float, default=0.5, metavar="SHARE", help="of hops that get a fault (default: %(default)s)"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), metavar="M", help="stop then, at the latest")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    soaked = Soaked("bare", options.seed)
    say(f"seed {soaked.seed}")
    soak(soaked, options.hops, options.minutes, options.faults)
    print(json.dumps(soaked.as_json()) if options.json else soaked)
    return 0 if soaked.good else 1


if __name__ == "__main__":
    sys.exit(main())
