"""A guest that runs in the transit becomes libvirt's again, whatever libvirt, its hooks and the new QEMU do."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.guests.daemon import Daemon, kill
from tests.support.guests.running import processes_of_domain, wait_until

from . import in_transit, intercepting
from .failing import CANNOT_LOAD, DYING, other_hook_refuses, wrapper
from .holding import Checkpoint
from .transit_guest import TransitGuest, measured


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


@pytest.mark.parametrize("moment", ["arrived", "transit ended"])
def test_keeper_that_dies_after_the_hop_does_not_lose_a_paused_guest(
    daemon: Daemon, transit: TransitGuest, new: Path, tmp_path: Path, moment: str
) -> None:
    """It has not run in the destination, and is there all the same."""
    daemon.virsh("suspend", transit.guest.name)
    transit.enter(new, environment=intercepting.environment(tmp_path, moment, intercepting.DIE))
    result = transit.finish()
    assert (result.get("emulator"), result.get("state")) == (str(new), "over"), result
    assert transit.guest.state == "paused"
    daemon.virsh("resume", transit.guest.name)
    transit.assert_arrived(new)


def test_destination_that_dies_after_the_hop_does_not_take_a_paused_guest_with_it(
    daemon: Daemon, transit: TransitGuest, old: Path, new: Path, tmp_path: Path
) -> None:
    """It has not run there, and the transit still has all of it."""
    daemon.virsh("suspend", transit.guest.name)
    kills = intercepting.KILL_DESTINATION_OF_MOVE
    transit.enter(new, environment=intercepting.environment(tmp_path, "arrived", kills))
    result = transit.finish()
    assert result.get("emulator") == str(old), result
    assert transit.guest.state == "paused"
    daemon.virsh("resume", transit.guest.name)
    transit.assert_arrived(old)


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
        # Sometimes libvirt answers nothing as long as that QEMU is there.
        assert "does not run within 5 s, and was ended" in result["failure"] or "did not answer" in result["failure"]
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


@pytest.mark.parametrize("newer", [True, False])
def test_bitmap_that_others_add_before_the_guest_arrives_is_removed(
    daemon: Daemon, transit: TransitGuest, old: Path, new: Path, tmp_path: Path, newer: bool
) -> None:
    """It does not know what the guest has written meanwhile, and an incremental backup would leave that out."""
    emulator = new if newer else old
    transit.enter(emulator, environment=intercepting.environment(tmp_path, "met", intercepting.WAIT))
    finishing = daemon.start_command(sys.executable, in_transit.__file__, "finish")
    reached = daemon.root / str(intercepting.REACHED).lstrip("/")
    wait_until(reached.exists, 60, "the moment comes")
    (before,) = (row["inserted"] for row in transit.guest.monitor("query-block")["return"] if "inserted" in row)
    daemon.virsh("checkpoint-create-as", transit.guest.name, "checkpoint")
    (daemon.root / str(intercepting.GO).lstrip("/")).touch()
    report = json.loads(finishing.communicate(timeout=60)[0])
    assert "dirty bitmap checkpoint was added before the guest was there" in str(report["notes"]), report
    (now,) = (row["inserted"] for row in transit.guest.monitor("query-block")["return"] if "inserted" in row)
    assert (now["node-name"], now.get("dirty-bitmaps", [])) == (before["node-name"], [])
    daemon.virsh("checkpoint-delete", transit.guest.name, "checkpoint", "--metadata")
    transit.assert_arrived(emulator)


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
