"""
The guests that ``tools/soak`` hops: one outside libvirt, and a domain. Each works: it writes its disk, pings, checks
its memory, and counts. What they have in common is what :mod:`.soaking` needs of a guest.
"""

from __future__ import annotations

import os
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Self, TypeAlias

from sevhop.records import journal
from sevhop.records.run_directory import RUN

from tests.support.guests import domain_life, linux
from tests.support.guests.build import ROOT
from tests.support.guests.daemon import Daemon, Description, DomainGuest, process_file
from tests.support.guests.domain_life import DomainLife
from tests.support.guests.judge import Verdict
from tests.support.guests.life import Life, lived_in
from tests.support.guests.machine import Machine
from tests.support.guests.running import Guest, processes_of, processes_of_domain, wait_until

from . import broken_hop, broken_transit, broken_upgrade
from .operator import Kind, Operator

Done: TypeAlias = subprocess.CompletedProcess[str]

_TIMEOUT = 600
_MEMORY_MIB = 256
#: Characters of what a QEMU has said that matter.
_SAID = 3000
_NAME = f"soaked-{os.getpid()}"


class SoakedGuest(ABC):
    """One that can be hopped, and be looked at from all sides."""

    @staticmethod
    @abstractmethod
    def faults() -> list[tuple[str, str]]:
        """All (point, fault) that a guest survives. One that kills the QEMU that has the guest is none of them."""

    #: Points at which others may do something to it; and at which they may have it run.
    others_change: tuple[str, ...]
    others_continue: tuple[str, ...]
    #: What an operator calls it.
    kind: Kind
    name: str
    #: What is done to it between hops.
    life: Life | DomainLife

    @staticmethod
    @abstractmethod
    def may_lose_the_new_qemu(point: str) -> bool:
        """Whether the guest cannot have run in the new QEMU when the command is killed there."""

    @abstractmethod
    def hop(self, emulator: Path, point: str, fault: str, operator: Operator | None) -> Done:
        """Hop, with a fault, and perhaps somebody who does something meanwhile."""

    @abstractmethod
    def recover(self) -> Done:
        """``sevhop recover``."""

    @abstractmethod
    def qemus(self) -> list[int]:
        """The processes that may be running it."""

    @abstractmethod
    def wait_for_ticks(self, more: int) -> None:
        """Wait until it has counted on."""

    @abstractmethod
    def seen(self) -> Verdict:
        """What it reports so far."""

    @abstractmethod
    def stop(self) -> Verdict:
        """Terminate it; the verdict then."""

    @abstractmethod
    def said(self) -> str:
        """What its QEMUs have written, at the end."""

    @abstractmethod
    def left_over(self) -> list[str]:
        """What hops have left behind."""

    @abstractmethod
    def daemon(self) -> int | None:
        """The pid of the daemon that it depends on."""


class Standalone(SoakedGuest):
    """A guest outside libvirt."""

    kind: Kind = "standalone"
    others_change = broken_hop.OTHERS_CHANGE
    others_continue = broken_hop.OTHERS_CONTINUE

    def __init__(self, guest: Guest, choices: Random) -> None:
        self._guest = guest
        self.name = str(guest.machine.directory)
        self.life = Life(guest.machine.directory, choices)

    @classmethod
    @contextmanager
    def start(cls, directory: Path, emulator: Path, choices: Random) -> Iterator[Standalone]:
        """Start one."""
        with Guest.start(lived_in(linux.on(Machine(directory, rich=True))), emulator) as guest:
            yield cls(guest, choices)

    @staticmethod
    def may_lose_the_new_qemu(point: str) -> bool:
        """See :class:`SoakedGuest`."""
        return point not in (*broken_hop.LOADING, *broken_hop.RUNNING)

    @staticmethod
    def faults() -> list[tuple[str, str]]:
        """See :class:`SoakedGuest`."""
        before = (*broken_hop.BEFORE_THE_STATE_IS_SAVED, *broken_hop.BEING_SAVED)
        in_the_source = (*before, *broken_hop.SAVED)
        in_the_destination = (*broken_hop.SAVED, *broken_hop.LOADING, *broken_hop.RUNNING)
        points = (*before, *in_the_destination)
        return [
            *((point, "command") for point in points),
            *((point, "destination") for point in in_the_source),
            *((point, "source") for point in in_the_destination),
            *_refusals(points, "error", "silence"),
        ]

    def hop(self, emulator: Path, point: str, fault: str, operator: Operator | None) -> Done:
        """See :class:`SoakedGuest`."""
        also = [str(operator)] if operator else []
        return _run("-m", broken_hop.__name__, self._guest.machine.monitor, emulator, point, fault, *also)

    def recover(self) -> Done:
        """See :class:`SoakedGuest`."""
        return _run("-m", "sevhop.cli", "recover")

    def qemus(self) -> list[int]:
        """See :class:`SoakedGuest`."""
        return processes_of(self._guest.machine.directory)

    def wait_for_ticks(self, more: int) -> None:
        """See :class:`SoakedGuest`."""
        self._guest.wait_for_ticks(more)

    def seen(self) -> Verdict:
        """See :class:`SoakedGuest`."""
        return self._guest.seen()

    def stop(self) -> Verdict:
        """See :class:`SoakedGuest`."""
        return self._guest.stop()

    def said(self) -> str:
        """See :class:`SoakedGuest`."""
        return self._guest.said()[-_SAID:]

    def left_over(self) -> list[str]:
        """See :class:`SoakedGuest`."""
        left = [str(path) for path in (*journal.journals(), *(RUN.iterdir() if RUN.exists() else ()))]
        return [path for path in left if not path.endswith("/domains")]

    def daemon(self) -> int | None:
        """See :class:`SoakedGuest`."""
        return None


class Domain(SoakedGuest):
    """A domain of a libvirt daemon that has no other. It is upgraded by way of a transit."""

    kind: Kind = "domain"
    others_change: tuple[str, ...] = broken_transit.OTHERS_CHANGE
    others_continue: tuple[str, ...] = broken_transit.OTHERS_CHANGE
    _program = broken_transit

    def __init__(self, guest: DomainGuest, choices: Random) -> None:
        self._guest = guest
        self.name = guest.name
        self.life = DomainLife(guest.daemon.run, guest.name, choices)

    @staticmethod
    def may_lose_the_new_qemu(point: str) -> bool:
        """See :class:`SoakedGuest`. It is libvirt's, and the keeper has an opinion on it."""
        return False

    @classmethod
    @contextmanager
    def start(cls, emulator: Path, choices: Random) -> Iterator[Self]:
        """Start a daemon and a domain in it."""
        with Daemon.installed() as daemon:
            images = linux.images()
            domain_life.make_files(daemon.run, _NAME)
            more = domain_life.devices(_NAME)
            description = Description(_NAME, emulator, "tcg", memory_mib=_MEMORY_MIB, linux=images, more=more)
            yield cls(DomainGuest.start(daemon, description), choices)

    @staticmethod
    def faults() -> list[tuple[str, str]]:
        """See :class:`SoakedGuest`."""
        before = (*broken_transit.IN_THE_SOURCE, *broken_transit.SAVED)
        after = (*broken_transit.IN_TRANSIT, *broken_transit.RESTORED)
        points = (*before, *after)
        # Unless it has a bitmap, the guest runs in the transit as soon as that has loaded it.
        not_loaded = (*broken_transit.IN_THE_SOURCE[2:], *broken_hop.SAVED)
        return [
            *((point, "command") for point in points),
            *((point, "destination") for point in not_loaded),
            *((point, "source") for point in (*broken_transit.SAVED, *after)),
            *((point, "keeper") for point in broken_transit.KEPT),
            *_refusals(points, "daemon", "error", "silence"),
        ]

    def hop(self, emulator: Path, point: str, fault: str, operator: Operator | None) -> Done:
        """See :class:`SoakedGuest`."""
        program = ["env", f"PYTHONPATH={ROOT}", sys.executable, "-m", self._program.__name__]
        also = [str(operator)] if operator else []
        done = self._guest.daemon.run(*program, self._guest.name, emulator, point, fault, *also)
        if fault == "daemon":
            self._guest.daemon.wait_until_it_answers()
        return done

    def recover(self) -> Done:
        """See :class:`SoakedGuest`."""
        return self._guest.daemon.sevhop("recover")

    def qemus(self) -> list[int]:
        """See :class:`SoakedGuest`."""
        return processes_of_domain(_NAME)

    def wait_for_ticks(self, more: int) -> None:
        """See :class:`SoakedGuest`."""
        self._guest.wait_for_ticks(more)

    def seen(self) -> Verdict:
        """See :class:`SoakedGuest`."""
        return self._guest.seen()

    def stop(self) -> Verdict:
        """See :class:`SoakedGuest`."""
        image = Path(self.life.facts()["file vda"])
        self._guest.daemon.virsh("shutdown", self._guest.name)
        wait_until(lambda: self._guest.state == "shut off", 120, "the guest switches itself off")
        return self._guest.judge(image)

    def said(self) -> str:
        """See :class:`SoakedGuest`."""
        log = self._guest.daemon.root / f"var/log/libvirt/qemu/{_NAME}.log"
        return log.read_text(errors="replace")[-_SAID:] if log.exists() else ""

    def left_over(self) -> list[str]:
        """See :class:`SoakedGuest`."""
        wait_until(lambda: not self._keepers(), 30, "the keeper ends")
        return self._guest.daemon.left_over()

    def _keepers(self) -> list[int]:
        return [pid for pid in self._guest.daemon.processes() if process_file(pid, "comm").startswith(b"sevhop")]

    def daemon(self) -> int | None:
        """See :class:`SoakedGuest`."""
        return self._guest.daemon.pid_of_libvirtd


class DomainWithoutTransit(Domain):
    """A domain that is upgraded without a transit."""

    others_change = broken_upgrade.OTHERS_CHANGE
    others_continue = broken_upgrade.OTHERS_CHANGE
    _program = broken_upgrade

    @staticmethod
    def faults() -> list[tuple[str, str]]:
        """See :class:`SoakedGuest`."""
        held = (*broken_upgrade.IN_THE_SOURCE, *broken_upgrade.HELD)
        saved = (*broken_upgrade.HELD, *broken_upgrade.RUNNING)
        points = (*broken_upgrade.IN_THE_SOURCE, *saved)
        return [
            *((point, "command") for point in points),
            *((point, "keeper") for point in held[1:]),
            *((point, "source") for point in saved),
            *_refusals(points, "daemon", "error", "silence"),
        ]


def _refusals(points: tuple[str, ...], *faults: str) -> list[tuple[str, str]]:
    return [(point, fault) for point in points if point.startswith("before ") for fault in faults]


def _run(*words: str | Path) -> Done:
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=_TIMEOUT, check=False
    )
