"""A guest that runs in the transit becomes libvirt's again, whatever libvirt, its hooks and the new QEMU do."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from bench.downtime import Sampler, memory_of

from tests.support.guests.build import Unavailable
from tests.support.guests.daemon import Daemon, DomainGuest, kill
from tests.support.guests.running import processes_of_domain, wait_until

from . import transiting
from .conftest import StartDomain

_PROGRAM = Path(transiting.__file__)
#: ms; a pause is some, and this machine is noisy.
LONGEST = 1000.0
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

    def enter(self, emulator: Path, timeout: float = 10.0) -> None:
        """The guest hops into a transit, and its old QEMU ends."""
        entered = self._program("enter", self.guest.name, str(emulator), str(timeout))
        self.image, self.transit = entered["image"], entered["transit"]
        self.downtimes.append(entered["downtime_ms"])

    def finish(self) -> dict[str, Any]:
        """libvirt restores the domain."""
        result = self._program("finish")
        self.downtimes.append(result.get("downtime_ms", 0.0))
        return result

    def _program(self, *words: str) -> dict[str, Any]:
        done = self.daemon.run(sys.executable, _PROGRAM, *words)
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
        assert self.guest.state == "running"
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


@pytest.fixture
def transit(daemon: Daemon, start: StartDomain, request: pytest.FixtureRequest) -> Iterator[TransitGuest]:
    """A domain that counts. In the end its longest pause is compared, and everything of it is ended."""
    with ExitStack() as resources:
        try:
            bridge = resources.enter_context(daemon.bridge())
        except Unavailable as err:
            pytest.skip(str(err))
        name = f"transit-{abs(hash(request.node.name)) % 10**8}"
        guest = start(name=name, interface=BRIDGED.format(bridge), elements=transiting.elements(name))
        resources.callback(end_everything, daemon, name)
        guest.wait_for_ticks()
        memory = memory_of(guest.pid)
        assert memory is not None
        sampler = resources.enter_context(Sampler(memory))
        sampler.wait()
        yield TransitGuest(daemon, guest, sampler)


def end_everything(daemon: Daemon, name: str) -> None:
    """Also after a failure: nothing of a test that failed is in the way of the next one."""
    for pid in [*daemon.named("sevhop-superviso"), *daemon.named("sevhop-keeper")]:
        kill(pid)
    for pid in processes_of_domain(name):
        kill(pid)
    daemon.run("virsh", "destroy", name)
    daemon.run("sh", "-c", "rm -rf /run/sevhop/* /run/transit.json")


@contextmanager
def measured(transit: TransitGuest, record: Any) -> Iterator[None]:
    """The guest never stands still for long."""
    yield
    longest = transit.longest_gap()
    text = f"longest gap {longest:.1f} ms, downtimes {[round(one, 1) for one in transit.downtimes]}"
    record("noted", text)
    print(text)
    assert longest < LONGEST


def test_guest_hops_from_transit_into_the_new_emulator_and_back(
    transit: TransitGuest, old: Path, new: Path, record_property: Any
) -> None:
    with measured(transit, record_property):
        for emulator in (new, old):
            transit.enter(emulator)
            transit.assert_in_transit()
            result = transit.finish()
            assert result.get("emulator") == str(emulator), result
            assert result["failure"] == "", result
            transit.assert_arrived(emulator)
            assert transit.guest.emulator("--inactive") == str(emulator)
