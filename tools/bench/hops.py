"""``sevhop hop`` of one guest, there and back between the two emulators, to compare an upgrade of a domain with."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.support.guests import emulators
from tests.support.guests.machine import Accelerator
from tests.support.guests.running import Guest, GuestFailed

from . import machines
from .busy import busy_loops
from .downtime import memory_of, touch
from .runs import Failed, Run
from .standalone import Given, hop
from .usage import Usage, counting
from .ways import DOMAINS, HOP


@dataclasses.dataclass(frozen=True)
class Hops:
    """
    Measures guests with the devices of a domain.

    :ivar scratch: directory of the guests' files.
    :ivar usage: counts processor time and memory; None where that is not possible.
    """

    accelerator: Accelerator
    scratch: Path
    usage: Usage | None = None

    def measure(self, kind: str, memory_mib: int, rounds: int, hosts: list[bool]) -> Iterator[Run | Failed]:
        """
        All runs with one kind of machine and one size of memory; a round is a hop there and one back.

        :param hosts: whether the host is busy, in turn.
        """
        try:
            yield from self._runs(kind, memory_mib, rounds, hosts)
        except GuestFailed as err:
            yield Failed(HOP, DOMAINS[kind], memory_mib, str(err))

    def _runs(self, kind: str, memory_mib: int, rounds: int, hosts: list[bool]) -> Iterator[Run]:
        old, new = (emulators.emulator(label) for label in (emulators.OLD, emulators.NEW))
        versions = {emulator: emulators.version(emulator) for emulator in (old, new)}
        with tempfile.TemporaryDirectory(dir=self.scratch) as directory:
            machine = machines.like_domain(kind, Path(directory), self.accelerator, memory_mib)
            with Guest.start(machine, old) as guest:
                guest.wait_for_ticks(3)
                touch(_memory(guest))
                for busy in hosts:
                    with busy_loops(busy):
                        for source, destination in [(old, new), (new, old)] * rounds:
                            given = Given(guest, destination, _memory(guest), Path(directory, "unused"))
                            with counting(None if busy else self.usage) as used:
                                outcome = hop(given)
                            what = HOP, DOMAINS[kind], memory_mib
                            run = Run.of(what, outcome, used, versions[source], versions[destination])
                            yield dataclasses.replace(run, busy=busy)
                verdict = guest.wait_for_ticks(3)
                if not verdict.unharmed:
                    raise GuestFailed(str(verdict))


def _memory(guest: Guest) -> Path:
    memory = memory_of(guest.pid)
    assert memory is not None
    return memory
