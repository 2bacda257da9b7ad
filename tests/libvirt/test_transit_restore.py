"""A guest that runs in the transit becomes libvirt's again, whatever libvirt, its hooks and the new QEMU do."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from bench.downtime import Sampler, memory_of

from tests.support.guests.build import Unavailable
from tests.support.guests.daemon import Daemon, DomainGuest, kill
from tests.support.guests.running import processes_of_domain, wait_until

from . import in_transit, intercepting
from .conftest import StartDomain
from .failing import CANNOT_LOAD, DYING, other_hook_refuses, wrapper
from .holding import Checkpoint

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


@pytest.fixture
def transit(daemon: Daemon, start: StartDomain, request: pytest.FixtureRequest) -> Iterator[TransitGuest]:
    """A domain that counts. In the end everything of it is ended. The parameter are further elements, in XML."""
    with ExitStack() as resources:
        try:
            bridge = resources.enter_context(daemon.bridge())
        except Unavailable as err:
            pytest.skip(str(err))
        more = getattr(request, "param", "")
        name = f"transit-{abs(hash(request.node.name)) % 10**8}"
        guest = start(name=name, interface=BRIDGED.format(bridge), elements=more)
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


@pytest.mark.parametrize("fault", [*DYING, "cannot load"])
def test_guest_is_restored_in_the_old_emulator_if_the_new_one_fails(
    daemon: Daemon, transit: TransitGuest, old: Path, new: Path, fault: str, record_property: Any
) -> None:
    text = {**DYING, "cannot load": CANNOT_LOAD}[fault]
    with measured(transit, record_property):
        transit.enter(new)
        # Only libvirt's destination fails.
        emulator = wrapper(daemon, "qemu-failing", new, text)
        broken = daemon.run("sed", "-i", f's|"new": "[^"]*"|"new": "{emulator}"|', "/run/transit.json")
        assert broken.returncode == 0
        result = transit.finish()
        assert result.get("emulator") == str(old), result
        assert str(emulator) in result["failure"]
        transit.assert_arrived(old)


def test_guest_stays_in_transit_if_no_emulator_works(
    daemon: Daemon, transit: TransitGuest, old: Path, new: Path, record_property: Any
) -> None:
    """... and is restored when one does."""
    with measured(transit, record_property):
        transit.enter(new)
        hook = daemon.root / "etc/libvirt/hooks/qemu.d/zz-other"
        hook.write_text('#!/bin/sh\n[ "$2/$3" = started/begin ] && exit 1\nexit 0\n')
        hook.chmod(0o755)
        try:
            result = transit.finish()
        finally:
            hook.unlink()
        assert (result["error"], result["guest"]) == ("RecoveryRequired", "running in the transit"), result
        transit.assert_in_transit()
        refused = daemon.run("virsh", "start", transit.guest.name)
        assert "its guest runs in the transit" in refused.stderr
        daemon.virsh("restore", transit.image)
        transit.assert_arrived(old)


def test_guest_is_not_touched_by_a_hook_that_refuses(
    daemon: Daemon, transit: TransitGuest, old: Path, new: Path, record_property: Any
) -> None:
    with measured(transit, record_property):
        transit.enter(new)
        with other_hook_refuses(daemon):
            result = transit.finish()
        assert result.get("emulator") == str(old), result
        transit.assert_arrived(old)


def test_guest_stays_in_transit_if_the_daemon_dies_before_it_accepts(
    daemon: Daemon, transit: TransitGuest, new: Path, record_property: Any
) -> None:
    with measured(transit, record_property):
        transit.enter(new)
        with Checkpoint.at(daemon, transit.guest, "started/begin", after=True) as checkpoint:
            client = transit.restore()
            checkpoint.wait()
            daemon.restart()
            client.communicate(timeout=60)
        transit.wait_for_state("transit")
        transit.assert_in_transit()
        result = transit.finish()
        assert result.get("emulator") == str(new), result
        transit.assert_arrived(new)


def test_destination_that_dies_while_it_loads_leaves_the_guest_in_transit(
    transit: TransitGuest, old: Path, new: Path, tmp_path: Path, record_property: Any
) -> None:
    with measured(transit, record_property):
        kills = intercepting.environment(tmp_path, "stopped", intercepting.KILL_DESTINATION)
        transit.enter(new, environment=kills)
        result = transit.finish()
        assert result.get("emulator") == str(old), result
        assert "the new QEMU exited" in result["failure"]
        transit.assert_arrived(old)


class TestWindow:
    """libvirt has accepted the destination, and the guest has not hopped yet."""

    @pytest.fixture
    def met(self, transit: TransitGuest, new: Path, tmp_path: Path) -> TransitGuest:
        transit.enter(new, environment=intercepting.environment(tmp_path, "met", intercepting.WAIT))
        transit.daemon.virsh("restore", transit.image)
        transit.wait_for_state("met")
        assert transit.guest.state == "running"
        transit.guest.wait_for_ticks()
        return transit

    def hop(self, met: TransitGuest) -> None:
        (met.daemon.root / str(intercepting.GO).lstrip("/")).touch()

    def test_daemon_that_dies_does_not_matter(self, met: TransitGuest, new: Path, record_property: Any) -> None:
        with measured(met, record_property):
            met.daemon.restart()
            self.hop(met)
            met.assert_arrived(new)

    def test_guest_that_is_suspended_arrives_paused(self, met: TransitGuest, new: Path) -> None:
        met.daemon.virsh("suspend", met.guest.name)
        self.hop(met)
        wait_until(lambda: met.daemon.named("sevhop-keeper") == [], 30, "the keeper exits")
        assert (met.guest.state, met.guest.monitor("query-status")["return"]["status"]) == ("paused", "paused")
        ticks = met.guest.seen().ticks
        met.daemon.virsh("resume", met.guest.name)
        met.guest.wait_for_ticks()
        assert met.guest.seen().ticks > ticks
        met.assert_arrived(new)

    def test_domain_that_is_destroyed_ends_the_guest(self, met: TransitGuest) -> None:
        met.daemon.virsh("destroy", met.guest.name)
        self.hop(met)
        wait_until(lambda: processes_of_domain(met.guest.name) == [], 30, "the transit ends")
        wait_until(lambda: met.daemon.named("sevhop-keeper") == [], 30, "the keeper exits")
        assert met.daemon.sevhop("recover").returncode == 5
        assert met.daemon.left_over() == []
        assert met.guest.state == "shut off"
        assert met.guest.seen().unharmed
        met.daemon.virsh("start", met.guest.name)

    def test_next_keeper_continues(self, met: TransitGuest, new: Path, record_property: Any) -> None:
        with measured(met, record_property):
            (pid,) = met.daemon.named("sevhop-keeper")
            kill(pid)
            met.wait_for_state("met")
            self.hop(met)
            met.assert_arrived(new)


@pytest.mark.parametrize("moment", ["stopped", "saved", "arrived"])
def test_keeper_that_dies_in_the_hop_loses_nothing(
    transit: TransitGuest, new: Path, tmp_path: Path, moment: str, record_property: Any
) -> None:
    with measured(transit, record_property):
        transit.enter(new, environment=intercepting.environment(tmp_path, moment, intercepting.DIE))
        if moment == "arrived":
            # The next keeper reports it to the command.
            result = transit.finish()
            assert (result.get("emulator"), result.get("state")) == (str(new), "over"), result
        else:
            transit.restore().communicate(timeout=60)
            reached = transit.daemon.root / str(intercepting.REACHED).lstrip("/")
            wait_until(reached.exists, 60, "the keeper dies")
            transit.wait_for_state("transit")
            transit.assert_in_transit()
            assert transit.finish().get("emulator") == str(new)
        transit.assert_arrived(new)


def test_keeper_that_dies_before_is_continued(
    daemon: Daemon, transit: TransitGuest, new: Path, record_property: Any
) -> None:
    with measured(transit, record_property):
        transit.enter(new)
        for _ in range(2):
            (pid,) = daemon.named("sevhop-keeper")
            kill(pid)
            transit.assert_in_transit()
        with Checkpoint.at(daemon, transit.guest, "started/begin", after=True) as checkpoint:
            client = transit.restore()
            checkpoint.wait()
            (pid,) = daemon.named("sevhop-keeper")
            kill(pid)
            transit.wait_for_state("restoring")
            checkpoint.release()
            client.communicate(timeout=60)
            assert client.returncode == 0
        transit.assert_arrived(new)


def kill_keeper_and_supervisor(daemon: Daemon) -> None:
    for name in ("sevhop-superviso", "sevhop-supervisor"[:15], "sevhop-keeper"):
        for pid in daemon.named(name):
            kill(pid)


def test_recover_restores_the_domain(daemon: Daemon, transit: TransitGuest, new: Path, record_property: Any) -> None:
    with measured(transit, record_property):
        transit.enter(new)
        status = daemon.sevhop("status").stdout
        assert f"the guest runs in the transit (QEMU 10.0.13, process {transit.transit})" in status, status
        done = daemon.sevhop("recover")
        assert (done.returncode, "runs in the new QEMU" in done.stdout) == (0, True), done
        transit.assert_arrived(new)


def test_recover_leaves_a_guest_that_waits_on_purpose(
    daemon: Daemon, transit: TransitGuest, new: Path, record_property: Any
) -> None:
    """Any client's restore has it hop; what is left is done by recover."""
    with measured(transit, record_property):
        transit.enter(new)
        (journal,) = (daemon.root / "var/lib/sevhop/journal").iterdir()
        lines = journal.read_bytes().partition(b"\0")[0]
        journal.write_bytes(lines + b'{"phase": "prepared"}\n')
        done = daemon.sevhop("recover")
        assert f"hop in progress: runs in the transit; to finish: virsh restore {transit.image}" in done.stdout, done
        transit.assert_in_transit()
        daemon.virsh("restore", transit.image)
        transit.assert_arrived(new)


@pytest.mark.parametrize("moment", ["transit", "met", "stopped", "arrived"])
def test_recover_finds_the_guest_without_keeper_and_supervisor(
    daemon: Daemon, transit: TransitGuest, new: Path, tmp_path: Path, moment: str
) -> None:
    environment = "" if moment == "transit" else intercepting.environment(tmp_path, moment, intercepting.WAIT)
    transit.enter(new, environment=environment)
    if moment != "transit":
        transit.restore().communicate(timeout=60)
        reached = daemon.root / str(intercepting.REACHED).lstrip("/")
        wait_until(reached.exists, 60, "the moment comes")
    kill_keeper_and_supervisor(daemon)
    if moment != "arrived":
        status = daemon.sevhop("status").stdout
        assert f"the guest runs in the transit (process {transit.transit}), without a keeper" in status, status
        if moment == "transit":
            refused = daemon.run("virsh", "start", transit.guest.name)
            assert f"its guest runs in the transit (process {transit.transit})" in refused.stderr
    done = daemon.sevhop("recover")
    assert (done.returncode, "runs in the new QEMU" in done.stdout) == (0, True), done
    transit.assert_arrived(new)


def test_destination_that_hangs_is_ended(
    daemon: Daemon, transit: TransitGuest, old: Path, new: Path, record_property: Any
) -> None:
    """It never asks for the guest."""
    with measured(transit, record_property):
        transit.enter(new, timeout=5.0)
        emulator = wrapper(daemon, "qemu-hanging", new, 'case "$*" in *-incoming*) exec sleep 1000;; esac')
        assert daemon.run("sed", "-i", f's|"new": "[^"]*"|"new": "{emulator}"|', "/run/transit.json").returncode == 0
        result = transit.finish()
        assert result.get("emulator") == str(old), result
        assert "does not run within 5 s, and was ended" in result["failure"]
        transit.assert_arrived(old)


def test_destination_that_hangs_while_it_loads_is_ended_in_a_step(
    transit: TransitGuest, old: Path, new: Path, tmp_path: Path
) -> None:
    halts = intercepting.environment(tmp_path, "stopped", intercepting.HALT_DESTINATION)
    transit.enter(new, timeout=6.0, environment=halts)
    result = transit.finish()
    assert result.get("emulator") in (str(old), str(new)), result
    transit.assert_arrived(Path(result["emulator"]))
    print(f"longest gap {transit.longest_gap():.1f} ms")


def test_hook_that_hangs_does_not_stop_the_guest(
    daemon: Daemon, transit: TransitGuest, new: Path, record_property: Any
) -> None:
    with measured(transit, record_property):
        transit.enter(new, timeout=5.0)
        with Checkpoint.at(daemon, transit.guest, "started/begin", after=True) as checkpoint:
            client = transit.restore()
            checkpoint.wait()
            transit.wait_for_state("transit")
            assert "no event" in transit.keeper_state()["reason"]
            transit.assert_in_transit()
            checkpoint.release()
            client.communicate(timeout=60)
        assert client.returncode == 1
        result = transit.finish()
        assert result.get("emulator") == str(new), result
        transit.assert_arrived(new)


def test_paused_guest_arrives_paused(daemon: Daemon, transit: TransitGuest, new: Path) -> None:
    daemon.virsh("suspend", transit.guest.name)
    transit.enter(new)
    result = transit.finish()
    assert result.get("emulator") == str(new), result
    assert (transit.guest.state, transit.guest.monitor("query-status")["return"]["status"]) == ("paused", "paused")
    daemon.virsh("resume", transit.guest.name)
    transit.assert_arrived(new)


ON_POWEROFF = "<on_poweroff>restart</on_poweroff>"


@pytest.mark.parametrize(("transit", "state"), [("", "shut off"), (ON_POWEROFF, "running")], indirect=["transit"])
def test_domain_follows_a_guest_that_ends_in_transit(
    daemon: Daemon, transit: TransitGuest, new: Path, state: str
) -> None:
    transit.enter(new)
    kill(transit.transit, signal.SIGTERM)
    wait_until(lambda: daemon.named("sevhop-keeper") == [], 30, "the keeper exits")
    assert transit.guest.state == state
    assert daemon.sevhop("recover").returncode == (5 if state == "shut off" else 0)
    assert daemon.left_over() == []
    if state == "shut off":
        daemon.virsh("start", transit.guest.name)


def test_guest_that_reboots_in_the_window_is_started_again(
    daemon: Daemon, transit: TransitGuest, new: Path, tmp_path: Path
) -> None:
    """Its reboot is a shutdown there."""
    transit.enter(new, environment=intercepting.environment(tmp_path, "met", intercepting.RESET_GUEST))
    transit.restore().communicate(timeout=60)
    wait_until(lambda: daemon.named("sevhop-keeper") == [], 60, "the keeper exits")
    assert transit.guest.state == "running"
    daemon.sevhop("recover")
    assert daemon.left_over() == []
