"""A domain whose guest can be brought into a transit, and how long that guest was stopped."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.downtime import Sampler, memory_of

from tests.support.guests.daemon import Daemon, DomainGuest, kill
from tests.support.guests.running import processes_of_domain, wait_until

from . import in_transit

#: Process names; the kernel truncates them to 15 characters.
KEEPER, SUPERVISOR = "sevhop-keeper", "sevhop-supervisor"[:15]
_PROGRAM = Path(in_transit.__file__)
#: ms; a pause is some of them.
LONGEST = 100.0
#: ms; the counter is idle for one of them at a time.
SHORTEST = 3
#: Part of the time in which somebody waits for a processor: then the guest may, too, for as many ms, but not for as
#: long as whoever fails is waited for.
BUSY, LONGEST_ON_BUSY_HOST = 0.02, 3000.0
BRIDGED = "<interface type='bridge'><source bridge='{}'/><model type='virtio'/></interface>"


class TransitGuest:
    """A domain whose guest counts, with a disk and a bridged card; it can be brought into a transit."""

    def __init__(self, daemon: Daemon, guest: DomainGuest, sampler: Sampler) -> None:
        self.daemon = daemon
        self.guest = guest
        self.sampler = sampler
        self.image = ""
        self.transit = 0
        self.downtimes: list[float] = []

    def enter(self, emulator: Path, timeout: float = 10.0, environment: str = "") -> None:
        """
        The guest hops into a transit, and its old QEMU ends.

        :param environment: ``NAME=VALUE`` for the keeper.
        """
        entered = self._program("enter", self.guest.name, str(emulator), str(timeout), environment=environment)
        self.image, self.transit = entered["image"], entered["transit"]
        self.downtimes.append(entered["downtime_ms"])

    def finish(self) -> dict[str, Any]:
        """libvirt restores the domain."""
        result = self._program("finish")
        self.downtimes.append(result.get("downtime_ms", 0.0))
        return result

    def restore(self) -> subprocess.Popen[str]:
        """A client that restores the domain."""
        return self.daemon.start_command("virsh", "restore", self.image)

    def _program(self, *words: str, environment: str = "") -> dict[str, Any]:
        prefix = ["env", environment] if environment else []
        done = self.daemon.run(*prefix, sys.executable, _PROGRAM, *words)
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    def keeper_state(self) -> dict[str, Any]:
        """What the keeper reports."""
        done = self.daemon.run(sys.executable, "-c", _STATUS)
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    def wait_for_state(self, state: str) -> dict[str, Any]:
        """Wait until the keeper is in a state."""
        wait_until(lambda: self.keeper_state()["state"] == state, 60, f"the keeper is in state {state}")
        return self.keeper_state()

    def assert_in_transit(self) -> None:
        """It counts there, and has lost nothing."""
        self.guest.wait_for_ticks()
        assert self.keeper_state()["state"] == "transit"
        assert Path(f"/proc/{self.transit}").exists()

    def assert_arrived(self, emulator: Path) -> None:
        """It counts in libvirt's QEMU, nothing is left, and it never stood still."""
        self.guest.wait_for_ticks()
        assert self.daemon.sevhop("recover").returncode == 0  # a client that has restored it has not finished the rest
        assert self.guest.state == "running"
        assert self.guest.emulator("--inactive") == str(emulator)
        assert self.guest.emulator() == str(emulator)
        assert self.guest.monitor("query-status")["return"]["status"] == "running"
        wait_until(lambda: self.daemon.left_over() == [], 30, "the keeper exits")
        wait_until(lambda: processes_of_domain(self.guest.name) == [self.guest.pid], 30, "the transit ends")
        self.sampler.see_growth()

    def longest_gap(self) -> float:
        """ms."""
        self.sampler.stop()
        began, ended = self.sampler.longest
        return (ended - began) / 1e6


_STATUS = """
import asyncio, json
from sevhop.keeper.client import KeeperClient
from sevhop.records.run_directory import DOMAINS, hop_of

async def main():
    (link,) = [path for path in DOMAINS.iterdir()]
    keeper = await KeeperClient.connect(hop_of(link.name))
    print(json.dumps(await keeper.status()))
    keeper.close()

asyncio.run(main())
"""


def kill_keeper_and_supervisor(daemon: Daemon) -> None:
    """The latter first: it would start another keeper."""
    for name in (SUPERVISOR, KEEPER):
        for pid in daemon.named(name):
            kill(pid)


def end_everything(daemon: Daemon, name: str) -> None:
    """Also after a failure: nothing of a test that failed is in the way of the next one."""
    kill_keeper_and_supervisor(daemon)
    for pid in processes_of_domain(name):
        kill(pid)
    daemon.run("virsh", "destroy", name)
    daemon.run(
        "sh", "-c", "rm -rf /run/sevhop/* /var/lib/sevhop/journal/* /run/transit.json /run/intercepted /run/go-on"
    )


@contextmanager
def measured(transit: TransitGuest, record: Any) -> Iterator[None]:
    """The guest is never stopped for long; see :func:`watched`."""
    load = _Load()
    yield
    _judge(transit.longest_gap(), f"downtimes {[round(one, 1) for one in transit.downtimes]}", load, record)


@contextmanager
def watched(guest: DomainGuest, record: Any) -> Iterator[None]:
    """A guest that counts is never stopped for long."""
    memory = memory_of(guest.pid)
    assert memory is not None
    with Sampler(memory, SHORTEST) as sampler:
        sampler.wait()
        load = _Load()
        yield
        sampler.see_growth()
        sampler.stop()
        began, ended = sampler.longest
        _judge((ended - began) / 1e6, "", load, record)


def _judge(longest: float, more: str, load: _Load, record: Any) -> None:
    text = f"longest gap {longest:.1f} ms; host busy for {load.busy:.0%} of the time"
    text = f"{text}; {more}" if more else text
    record("noted", text)
    print(text)
    assert longest < (LONGEST if load.busy < BUSY else LONGEST_ON_BUSY_HOST), text


class _Load:
    """
    How busy the host has been since then.

    :ivar busy: part of the time in which somebody has waited for a processor (Documentation/accounting/psi.rst).
    """

    def __init__(self) -> None:
        self._began, self._before = time.monotonic(), _waited()

    @property
    def busy(self) -> float:
        return (_waited() - self._before) / (time.monotonic() - self._began)


def _waited() -> float:
    """Seconds, since the host was started."""
    some = Path("/proc/pressure/cpu").read_text().splitlines()[0]
    return int(some.rpartition("=")[2]) / 1e6
