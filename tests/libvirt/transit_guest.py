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

from bench.downtime import Sampler

from tests.support.guests.daemon import Daemon, DomainGuest, kill
from tests.support.guests.running import processes_of_domain, wait_until

from . import in_transit

_PROGRAM = Path(in_transit.__file__)
#: ms; a pause is some of them, and this host is noisy.
LONGEST = 1000.0
#: Part of the time in which somebody waits for a processor: then the guest may, too.
BUSY = 0.3
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


def end_everything(daemon: Daemon, name: str) -> None:
    """Also after a failure: nothing of a test that failed is in the way of the next one."""
    for pid in [*daemon.named("sevhop-superviso"), *daemon.named("sevhop-keeper")]:
        kill(pid)
    for pid in processes_of_domain(name):
        kill(pid)
    daemon.run("virsh", "destroy", name)
    daemon.run(
        "sh", "-c", "rm -rf /run/sevhop/* /var/lib/sevhop/journal/* /run/transit.json /run/intercepted /run/go-on"
    )


@contextmanager
def measured(transit: TransitGuest, record: Any) -> Iterator[None]:
    """The guest is never stopped for long. On a host without a free processor that is only printed."""
    began, waited = time.monotonic(), _waited()
    yield
    longest = transit.longest_gap()
    busy = (_waited() - waited) / (time.monotonic() - began)
    downtimes = [round(one, 1) for one in transit.downtimes]
    text = f"longest gap {longest:.1f} ms, downtimes {downtimes}; host busy for {busy:.0%} of the time"
    record("noted", text)
    print(text)
    assert longest < LONGEST or busy > BUSY


def _waited() -> float:
    """Seconds in which somebody on this host has waited for a processor (Documentation/accounting/psi.rst)."""
    some = Path("/proc/pressure/cpu").read_text().splitlines()[0]
    return int(some.rpartition("=")[2]) / 1e6
