"""
Methods to move a libvirt domain into another QEMU process: both ways of ``sevhop upgrade``, and ``virsh save`` with
``restore``.

They alternate with one domain in a private daemon. An upgrade goes to the other of the two emulators; save and restore
stay in the domain's emulator, since they cannot change it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.support.guests import emulators, linux
from tests.support.guests.daemon import Daemon, Description, DomainGuest
from tests.support.guests.machine import Accelerator
from tests.support.guests.running import PATIENCE, GuestFailed, processes_of_domain, wait_until

from . import machines
from .busy import busy_loops
from .downtime import Sampler, memory_of, touch
from .pings import Pings
from .report import SAVE_RESTORE
from .runs import Failed, Outcome, Run
from .saving import save_and_restore
from .standalone import SELDOM
from .usage import Usage, counting
from .ways import DOMAINS, NO_TRANSIT, NOTHING, OPTIONS, TRANSIT, Pinged

UPGRADES = (TRANSIT, NO_TRANSIT)
MODES = (*UPGRADES, SAVE_RESTORE, NOTHING)
#: Calls of the hook for a domain that is in no hop.
_FOREIGN_CALLS = 20
#: Seconds until the last process of an upgrade has exited.
_PATIENCE = 30.0


class Domains:
    """
    Measures domains in a daemon. A context manager.

    :param images: directory of the save images; on a disk, as usual.
    :param usage: counts processor time and memory; None where that is not possible.
    """

    def __init__(self, accelerator: Accelerator, images: Path, usage: Usage | None = None) -> None:
        self._accelerator = accelerator
        self._usage = usage
        self._image = images / "domain.save"
        self._old, self._new = (emulators.emulator(label) for label in (emulators.OLD, emulators.NEW))
        self._warm = False
        self._seconds = 1.0  # of the last upgrade
        self._daemon = Daemon.start()

    def __enter__(self) -> Domains:
        try:
            self._daemon.install()
        except BaseException:
            self._daemon.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._daemon.stop()
        self._image.unlink(missing_ok=True)

    def measure(
        self, kind: str, memory_mib: int, rounds: int, modes: Sequence[str], hosts: Sequence[bool]
    ) -> Iterator[Run | Failed]:
        """
        All runs with one kind of machine and one size of memory.

        :param rounds: with an upgrade there and one back, each of every wanted way. Memory is saved in some of them.
        :param hosts: whether the host is busy, in turn. Memory is saved on an idle one only.
        """
        description = machines.domain(kind, f"bench-{kind}-{memory_mib}", self._old, self._accelerator, memory_mib)
        machine, mode = DOMAINS[kind], modes[0]
        try:
            with self._started(description) as guest:
                guest.wait_for_ticks()
                touch(_memory(guest))
                self._warm_up(guest)
                for busy in hosts:
                    with busy_loops(busy):
                        for mode in turns(modes, rounds, save=not busy):
                            if mode == NOTHING:
                                yield self._nothing(guest, machine, memory_mib, busy)
                            elif mode == SAVE_RESTORE:
                                yield save_and_restore(guest, self._image, self._usage, machine, memory_mib)
                            else:
                                yield self._upgrade(guest, mode, machine, memory_mib, busy)
                guest.wait_for_ticks()
        except GuestFailed as err:
            yield Failed(mode, machine, memory_mib, str(err))

    def ping(self, kind: str, memory_mib: int, rounds: int, modes: Sequence[str]) -> Iterator[Pinged | Failed]:
        """
        The same with a Linux guest, that is pinged during each upgrade.

        :raises tests.support.guests.build.Unavailable: there is no Linux, or no bridge.
        """
        machine, mode = DOMAINS[kind], modes[0]
        try:
            with self._daemon.bridge() as bridge:
                name = f"bench-pinged-{kind}-{memory_mib}"
                with self._started(machines.linux_domain(kind, name, self._old, bridge, memory_mib)) as guest:
                    guest.wait_for_ticks()
                    _allocate(_memory(guest))
                    self._warm_up(guest)
                    for mode in turns(modes, rounds):
                        emulator = self._other(guest)
                        with Pings(self._daemon, linux.ADDRESS) as pings:
                            report = upgrade(guest, mode, emulator)
                            pings.stop()
                        yield Pinged(mode, machine, memory_mib, pings.sent, pings.lost, longest_pause(report))
                    _verify_it_ticks(guest)
        except GuestFailed as err:
            yield Failed(mode, machine, memory_mib, f"pinged: {err}")

    @contextlib.contextmanager
    def _started(self, description: Description) -> Iterator[DomainGuest]:
        """A domain, until the end of the context. :raises GuestFailed: then something of it is left."""
        guest = DomainGuest.start(self._daemon, description)
        try:
            yield guest
        except GuestFailed:
            self._daemon.sevhop("recover")  # it may have been left in a transit, and the next guest needs the memory
            raise
        finally:
            guest.end()
        wait_until(lambda: not processes_of_domain(guest.name), _PATIENCE, "no process is left")
        wait_until(lambda: not self._daemon.left_over(), _PATIENCE, "no file is left")

    def _warm_up(self, guest: DomainGuest) -> None:
        """The first use of an emulator takes libvirt longer, and fills the page cache."""
        for emulator in () if self._warm else (self._new, self._old):
            upgrade(guest, TRANSIT, emulator)
        self._warm = True

    def _other(self, guest: DomainGuest) -> Path:
        """The emulator that it does not have."""
        return self._old if guest.emulator() == str(self._new) else self._new

    def _upgrade(self, guest: DomainGuest, mode: str, machine: str, memory_mib: int, busy: bool) -> Run:
        emulator = self._other(guest)
        with Sampler(_memory(guest)) as sampler, counting(None if busy else self._usage) as used:
            sampler.wait()
            began = time.monotonic()
            report = upgrade(guest, mode, emulator)
            ended = time.monotonic()
            self._seconds = ended - began
            sampler.see_growth()
            sampler.stop()
        phases = {phase["name"]: phase["ms"] for phase in report["phases"]}
        outcome = Outcome(sampler.longest, began, ended, phases, longest_pause(report))
        versions = (report["source"]["version"], report["destination"]["version"])
        return dataclasses.replace(Run.of((mode, machine, memory_mib), outcome, used, *versions), busy=busy)

    def _nothing(self, guest: DomainGuest, machine: str, memory_mib: int, busy: bool) -> Run:
        """As much time as the last upgrade took."""
        with Sampler(_memory(guest)) as sampler:
            sampler.wait()
            began = time.monotonic()
            time.sleep(self._seconds)
            ended = time.monotonic()
            sampler.see_growth()
            sampler.stop()
        of = emulators.version(Path(guest.emulator()))
        run = Run.of((NOTHING, machine, memory_mib), Outcome(sampler.longest, began, ended), None, of, of)
        return dataclasses.replace(run, busy=busy)

    def hook_of_a_foreign_domain(self) -> list[float]:
        """Milliseconds of each call of the hook for a domain that is in no hop."""
        script = "/etc/libvirt/hooks/qemu.d/sevhop"
        code = "import subprocess, sys, time\nfor n in range(int(sys.argv[1])):\n    t = time.monotonic()\n"
        code += "    subprocess.run([sys.argv[2], 'other', 'started', 'begin', '-'], input=b'', check=True)\n"
        code += "    print((time.monotonic() - t) * 1e3)\n"
        done = self._daemon.run("python3", "-c", code, str(_FOREIGN_CALLS), script)
        if done.returncode:
            raise GuestFailed(f"the hook of a domain that is in no hop: {done.stderr.strip()}")
        return [float(line) for line in done.stdout.split()]


def turns(modes: Sequence[str], rounds: int, *, save: bool = False) -> list[str]:
    """
    What is done in turn; each upgrade there is followed by the same one back. What takes long, or is only there to
    compare with, is done in some of the rounds.

    :param save: save the memory as well.
    """
    found: list[str] = []
    for number in range(rounds):
        found += [mode for mode in UPGRADES if mode in modes for _ in range(2)]
        if number % SELDOM == 0:
            found += [SAVE_RESTORE] * 2 if save and SAVE_RESTORE in modes else []
            found += [NOTHING] if NOTHING in modes else []
    return found


def longest_pause(report: dict[str, Any]) -> float:
    """Of an upgrade, in ms, as sevhop reports it."""
    pauses: list[float] = report["downtimes_ms"] or [report["downtime_ms"]]
    return max(pauses)


def upgrade(guest: DomainGuest, mode: str, emulator: Path) -> dict[str, Any]:
    """
    Upgrade a domain.

    :return: the report.
    :raises GuestFailed: it was not done, or in the other way.
    """
    report = guest.daemon.upgrade(guest.name, *OPTIONS[mode], "--emulator", emulator)
    if report["outcome"] != "done":
        raise GuestFailed(f"{report['reason']}; the guest: {report['guest_state']}")
    if len(report["downtimes_ms"]) != (2 if mode == TRANSIT else 0):
        raise GuestFailed(f"upgraded in the other way: {'; '.join(report['notes']) or 'without a note'}")
    return report


def _memory(guest: DomainGuest) -> Path:
    memory = memory_of(guest.pid)
    assert memory is not None
    return memory


def _verify_it_ticks(guest: DomainGuest) -> None:
    """:raises GuestFailed: it does not, or anything but pings was lost; its own are as lost as those to it."""
    ticks = guest.seen().ticks
    wait_until(lambda: guest.seen().ticks > ticks, PATIENCE, "the pinged guest ticks")
    verdict = dataclasses.replace(guest.seen(), network_errors=0)
    if not verdict.unharmed:
        raise GuestFailed(str(verdict))


def _allocate(memory: Path) -> None:
    """Have all of a guest's memory in the host's; what the guest has written there stays."""
    fd = os.open(memory, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.posix_fallocate(fd, 0, os.fstat(fd).st_size)
    finally:
        os.close(fd)
