"""
What ``tools/soak`` runs: a guest that works, hopping to and fro between two QEMUs, with faults at random points.

It lives meanwhile (:mod:`tests.support.guests.life`): between hops, and at random points of them. After every hop,
interrupted or not, ``sevhop recover`` runs, sometimes when time has passed or the new QEMU hangs or has ended, and the
guest must run in exactly one QEMU (see :mod:`.soaked_guests`) as what it was. What hops keep on the host is kept in
file systems of this process's own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import secrets
import signal
import sys
import tempfile
import time
from collections import Counter, deque
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sevhop_qmp.errors import SevhopError

from tests.support.guests import emulators
from tests.support.guests.domain_life import VirshFailed
from tests.support.guests.ending import end_in_order
from tests.support.guests.isolation import isolate
from tests.support.guests.judge import Verdict
from tests.support.guests.life import Facts, NotNow, applied, differences
from tests.support.guests.running import GuestFailed, wait_until

from .fault import kill
from .operator import Operator
from .soaked_guests import Domain, DomainWithoutTransit, SoakedGuest, Standalone

#: Ticks that the guest must count on after each hop.
_TICKS = 2
#: Descriptors more than after an earlier hop that are no leak: QEMU opens some when they are needed first, and each
#: snapshot, job and drive takes some.
_DESCRIPTORS = 2
_OF_ITS_LIFE = 16
#: Seconds in which connections that are just being closed should be so.
_SETTLED = 10.0
#: How much a daemon may grow, once it has had time to fill its caches: it is C that allocates and frees.
_GROWTH = 1.25
#: Hops that give it that time.
_WARM = 20


class SoakFailed(Exception):
    """A guest did not come out of a hop, or something was left behind."""


@dataclass
class Soaked:
    """
    What has come of it.

    :ivar verdict: what the guest reports.
    :ivar steps: faults by point and kind.
    :ivar lived: what was done to the guest, and what came of it.
    :ivar ends: hops by exit status of the command; -9 and 137 are a command that was killed.
    :ivar leaks: what was left behind or has grown, in words.
    :ivar daemon_kib: memory of the libvirt daemon, when it was warm and at the end; a restarted one starts again.
    """

    path: str
    seed: int
    hops: int = 0
    faults: int = 0
    seconds: float = 0.0
    verdict: Verdict = field(default_factory=Verdict)
    steps: Counter[str] = field(default_factory=Counter)
    lived: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    leaks: list[str] = field(default_factory=list)
    daemon_kib: list[int] = field(default_factory=list)
    failure: str = ""

    @property
    def good(self) -> bool:
        """Whether nothing was lost and nothing was left."""
        return self.verdict.unharmed and not (self.leaks or self.failure)

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "path": self.path,
            "seed": self.seed,
            "hops": self.hops,
            "faults": self.faults,
            **self._counts(),
            "leaks": self.leaks,
            "failure": self.failure,
            "seconds": round(self.seconds),
            "daemon_kib": self.daemon_kib,
            "ends": dict(sorted(self.ends.items())),
            "steps": dict(sorted(self.steps.items())),
            "lived": dict(sorted(self.lived.items())),
        }

    def _counts(self) -> dict[str, int]:
        verdict = self.verdict
        return {
            "ticks": verdict.ticks,
            "ticks_lost": verdict.ticks_lost,
            "ticks_repeated": verdict.ticks_repeated + verdict.restarts,
            "disk_errors": verdict.disk_errors,
            "memory_errors": verdict.memory_errors,
            "network_errors": verdict.network_errors,
        }

    def __str__(self) -> str:
        counts = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in self._counts().items())
        head = f"{self.path}, seed {self.seed}: {self.hops} hops, {self.faults} faults in {self.seconds:.0f} s"
        lines = [f"{head}; {counts}, leaks {len(self.leaks)}"]
        lines += [f"  {count:5} exit status {status}" for status, count in sorted(self.ends.items())]
        lines += [f"  {count:5} {step}" for step, count in sorted(self.steps.items())]
        lines += [f"  {count:5} {what}" for what, count in sorted(self.lived.items())]
        lines += [f"leak: {leak}" for leak in self.leaks] + ([f"failed: {self.failure}"] if self.failure else [])
        return "\n".join(lines)


def say(text: str) -> None:
    """Progress goes to standard error."""
    print(f"soak: {text}", file=sys.stderr, flush=True)


class Soak:
    """
    Hops of one guest.

    :param scratch: a directory for what operators report.
    :param share: of hops that get a fault; ``life``: of those before, during, or after which something is done to it.
    """

    def __init__(
        self,
        soaked: Soaked,
        guest: SoakedGuest,
        choices: random.Random,
        scratch: Path,
        *,
        share: float,
        life: float,
        old: Path,
        new: Path,
    ) -> None:
        self._soaked = soaked
        self._guest = guest
        self._random = choices
        self._scratch = scratch
        self._share = share
        self._life = life
        self._emulators = {old.resolve(): new, new.resolve(): old}
        self._descriptors: dict[Path, int] = {}
        self._daemon = (0, 0)
        # What was done last, for whoever has to find out why it failed.
        self.history: deque[str] = deque(maxlen=12)
        # Somebody may still be about to do something to the guest, so a hop may be refused.
        self._unsettled = False

    def hop(self) -> None:
        """
        Hop once.

        :raises SoakFailed: the guest did not come out of it as it was, or there are several of it.
        """
        soaked, guest = self._soaked, self._guest
        point, fault = ("phase check", "none")
        if self._random.random() < self._share:
            point, fault = self._random.choice(guest.faults())
            soaked.faults += 1
            soaked.steps[f"{fault} {point}"] += 1
        self._live_on()
        operator = self._operator()
        before = guest.life.facts()
        (pid,) = guest.qemus()
        done = guest.hop(self._emulators[_program(pid)], point, fault, operator)
        soaked.hops += 1
        soaked.ends[str(done.returncode)] += 1
        self.history.append(f"hop from {pid} ({fault} at {point}, {operator}): {done.returncode}")
        what = f"hop {soaked.hops} ({fault} at {point}, {operator}): {done.stdout.strip()} {done.stderr.strip()[-500:]}"
        if fault == "command" and self._random.random() < self._life:
            self._let_time_pass(point, pid)
        recovered = guest.recover()
        fine = not done.returncode or fault != "none" or operator or self._unsettled
        if recovered.returncode or not fine:
            raise SoakFailed(f"{what}; recover: {recovered.stdout.strip()} {recovered.stderr.strip()[-500:]}")
        if len(pids := guest.qemus()) != 1:
            raise SoakFailed(f"{what}: processes {pids}")
        try:
            self._see_it_is_what_it_was(before, operator)
            guest.wait_for_ticks(_TICKS)
            left = guest.left_over()
        except (GuestFailed, VirshFailed, SevhopError) as err:
            raise SoakFailed(f"{what}: {err}") from err
        if left:
            raise SoakFailed(f"{what}: left behind: {', '.join(left)}")
        self._look_for_growth(pids[0])

    def _live_on(self) -> None:
        """Something happens to the guest, between two hops; it may be paused when the next one begins."""
        if self._random.random() < self._life:
            self._run_phase(self._guest.life.draw())
        if self._random.random() < self._life / 4:
            self._run_phase("stop")

    def _run_phase(self, what: str) -> None:
        try:
            before = self._guest.life.facts()
            expected = applied(before, self._guest.life.do(what))
            if found := differences(expected, self._guest.life.facts()):
                raise SoakFailed(f"{what}: {'; '.join(found)}")
            self._soaked.lived[f"{what}: done"] += 1
            self.history.append(what)
        except NotNow:
            pass
        except (SevhopError, VirshFailed) as err:
            self._soaked.lived[f"{what}: {err}"] += 1
            self.history.append(f"{what}: {err}")

    def _operator(self) -> Operator | None:
        if self._random.random() > self._life / 2:
            return None
        what, points = self._guest.life.draw(), self._guest.others_change
        if self._random.random() < 0.3:
            what, points = self._random.choice([("stop", points), ("cont", self._guest.others_continue)])
        seed = self._random.getrandbits(32)
        answer = self._scratch / f"operator-{self._soaked.hops}"
        return Operator(self._random.choice(points), what, seed, self._guest.kind, self._guest.name, str(answer))

    def _let_time_pass(self, point: str, source: int) -> None:
        """What may be before somebody calls ``sevhop recover``."""
        others = [pid for pid in self._guest.qemus() if pid != source]
        how = self._random.choice(["time", "hangs", "ends"])
        if how == "hangs" and others and self._guest.may_lose_the_new_qemu("phase load"):
            os.kill(others[0], signal.SIGSTOP)
            answer = self._guest.recover()
            with contextlib.suppress(ProcessLookupError):
                os.kill(others[0], signal.SIGCONT)
            self._soaked.lived[f"recover while the new QEMU hangs: exit status {answer.returncode}"] += 1
        elif how == "ends" and others and self._guest.may_lose_the_new_qemu(point):
            kill(others[0])
            self._soaked.lived["the new QEMU ends before recover"] += 1
        else:
            time.sleep(self._random.uniform(0, 2))
            self._soaked.lived["time passes before recover"] += 1

    def _see_it_is_what_it_was(self, before: Facts, operator: Operator | None) -> None:
        after = self._guest.life.facts()
        found = operator.wrong(before, after) if operator else differences(before, after)
        if found:
            raise SoakFailed(f"hop {self._soaked.hops} ({operator}): {'; '.join(found)}")
        self._unsettled = operator is not None and not operator.done_in_full()
        if operator:
            self._soaked.lived[f"meanwhile {operator.what}: {'unknown' if self._unsettled else 'done'}"] += 1
        if after["status"] == "paused":
            self._run_phase("cont")

    def _look_for_growth(self, qemu: int) -> None:
        first = self._descriptors.setdefault(_program(qemu), _descriptors(qemu))
        more = _DESCRIPTORS + (_OF_ITS_LIFE if self._life else 0)
        try:
            wait_until(lambda: _descriptors(qemu) <= first + more, _SETTLED, "connections are closed")
        except GuestFailed:
            self._leak(f"{_descriptors(qemu)} descriptors in QEMU, {first} in the beginning")
        daemon = self._guest.daemon()
        if daemon is None:
            return
        if daemon != self._daemon[0]:
            self._daemon = (daemon, self._soaked.hops + _WARM)
        elif self._soaked.hops == self._daemon[1]:
            self._soaked.daemon_kib = [_kib(daemon), _kib(daemon)]
        elif self._soaked.hops > self._daemon[1]:
            self._soaked.daemon_kib[1] = _kib(daemon)
            before, now = self._soaked.daemon_kib
            if now > before * _GROWTH:
                self._leak(f"the daemon has grown from {before} to {now} KiB")

    def _leak(self, text: str) -> None:
        self._soaked.leaks.append(f"hop {self._soaked.hops}: {text}")


def _program(pid: int) -> Path:
    return Path(os.readlink(f"/proc/{pid}/exe"))


def _descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def _kib(pid: int) -> int:
    """Resident memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0])


def soak(soaked: Soaked, hops: int, minutes: float, share: float, life: float) -> None:
    """
    Hop until there have been so many, or so many minutes are over, or something went wrong.

    :param share: see :class:`Soak`; ``life`` as well.
    """
    old, new = emulators.emulator(emulators.OLD), emulators.emulator(emulators.NEW)
    began = time.monotonic()
    shm = set(os.listdir("/dev/shm"))
    with tempfile.TemporaryDirectory(prefix="sevhop-soak-") as scratch:
        starting: AbstractContextManager[SoakedGuest]
        choices = random.Random(soaked.seed)
        if soaked.path == "standalone":
            starting = Standalone.start(Path(scratch, "guest"), old, choices)
        else:
            starting = {"libvirt": Domain, "no-transit": DomainWithoutTransit}[soaked.path].start(old, choices)
        with starting as guest:
            guest.wait_for_ticks(_TICKS)
            run = Soak(soaked, guest, choices, Path(scratch), share=share, life=life, old=old, new=new)
            try:
                if life:
                    guest.life.live()
                while soaked.hops < hops and time.monotonic() - began < minutes * 60:
                    run.hop()
                    if soaked.hops % 25 == 0:
                        say(f"{soaked.hops} hops, {soaked.faults} faults, {guest.seen().ticks} ticks")
            except SoakFailed as err:
                soaked.failure = str(err)
                say("\n".join([*run.history, soaked.failure, f"its QEMUs said: {guest.said()}"]))
            try:
                soaked.verdict = guest.stop()  # looks into the disk, too
            except GuestFailed as err:
                soaked.failure = soaked.failure or str(err)
                soaked.verdict = guest.seen()
    soaked.leaks += [f"/dev/shm/{name}" for name in set(os.listdir("/dev/shm")) - shm]
    soaked.seconds = time.monotonic() - began


def main() -> int:
    """Hop, and print what became of it."""
    parser = argparse.ArgumentParser(prog="tools/soak", description="Hop a guest again and again, with random faults.")
    parser.add_argument("--hops", type=int, default=1000, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32), metavar="S", help="of all choices")
    parser.add_argument(
        "--path",
        choices=("standalone", "libvirt", "no-transit"),
        default="standalone",
        help="without libvirt, or upgrades of a domain; those without a transit (default: %(default)s)",
    )
    parser.add_argument(
        "--faults", type=float, default=0.5, metavar="SHARE", help="of hops that get a fault (default: %(default)s)"
    )
    parser.add_argument(
        "--life", type=float, default=0.5, metavar="SHARE", help="of hops before which it lives (default: %(default)s)"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), metavar="M", help="stop then, at the latest")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    end_in_order()
    soaked = Soaked(options.path, options.seed)
    say(f"seed {soaked.seed}")
    isolate()
    soak(soaked, options.hops, options.minutes, options.faults, options.life)
    print(json.dumps(soaked.as_json()) if options.json else soaked)
    return 0 if soaked.good else 1


if __name__ == "__main__":
    sys.exit(main())
