"""Faults of libvirt's hook during a restore."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.support.guests.daemon import Daemon, DomainGuest, kill
from tests.support.guests.running import wait_until

from .conftest import StartDomain
from .holding import Checkpoint, PausedUpgrade

pytestmark = pytest.mark.virtqemud
_SCRIPT = Path("/etc/libvirt/hooks/qemu.d/sevhop")


def assert_rolled_back(daemon: Daemon, guest: DomainGuest, old: Path, new: Path) -> None:
    """The guest runs in the old emulator, nothing of it is lost, nothing is left behind, and another upgrade works."""
    assert guest.emulator() == guest.emulator("--inactive") == str(old)
    guest.wait_for_ticks()
    assert daemon.left_over() == []
    assert daemon.upgrade(guest.name, "--no-transit", "--emulator", new)["outcome"] == "done"
    guest.wait_for_ticks()


def test_upgrade_rolls_back_if_hook_is_killed_in_commit(
    daemon: Daemon, start: StartDomain, old: Path, new: Path
) -> None:
    """To libvirt that is a refusal, whatever the keeper has done meanwhile."""
    guest = start()
    guest.wait_for_ticks()
    with (
        Checkpoint.at(daemon, guest, "started/begin") as checkpoint,
        PausedUpgrade.at("restore", guest, new, "--no-transit") as upgrade,
    ):
        upgrade.resume()
        checkpoint.wait()
        [keeper] = daemon.named("sevhop-keeper")
        os.kill(keeper, signal.SIGSTOP)
        try:
            checkpoint.release()
            wait_until(lambda: bool(daemon.with_arguments(guest.name, "started", "sevhop")), 60, "the hook runs")
            for pid in daemon.with_arguments(guest.name, "started", "sevhop"):
                kill(pid)
        finally:
            os.kill(keeper, signal.SIGCONT)
        report = upgrade.finish()
    assert (report["status"], report["outcome"]) == (3, "rolled-back"), report
    assert_rolled_back(daemon, guest, old, new)


def test_hook_succeeds_only_for_first_of_concurrent_calls(
    daemon: Daemon, start: StartDomain, old: Path, new: Path
) -> None:
    """Only the first call succeeds. If that is not libvirt's own, libvirt terminates the destination."""
    guest = start()
    guest.wait_for_ticks()
    xml = f"<domain><uuid>{daemon.virsh('domuuid', guest.name)}</uuid></domain>"
    call = f"echo '{xml}' | {_SCRIPT} {guest.name} started begin -"
    with (
        Checkpoint.at(daemon, guest, "started/begin") as checkpoint,
        PausedUpgrade.at("restore", guest, new, "--no-transit") as upgrade,
    ):
        upgrade.resume()
        checkpoint.wait()
        calls = [daemon.start_command("sh", "-c", call) for _ in range(4)]
        for one in calls:
            one.communicate(timeout=60)
        checkpoint.release()
        report = upgrade.finish()
    assert sorted(one.returncode for one in calls) == [0, 1, 1, 1]
    assert (report["status"], report["outcome"]) == (3, "rolled-back"), report
    assert_rolled_back(daemon, guest, old, new)


def test_hook_runs_no_python_for_a_domain_in_no_hop(daemon: Daemon, start: StartDomain) -> None:
    """Its hook works without a Python, even while another domain is in a hop."""
    guest = start()
    guest.wait_for_ticks()
    suspended = start(name="suspended")
    suspended.wait_for_ticks()
    image = daemon.upgrade(suspended.name, "--no-transit", "--prepare")["image"]
    inside = daemon.root / str(_SCRIPT).lstrip("/")
    script = inside.read_text()
    inside.write_text(script.replace("python", "no-such-python"))
    assert inside.read_text() != script
    try:
        assert daemon.run("virsh", "managedsave", guest.name).returncode == 0
        daemon.virsh("start", guest.name)
        guest.wait_for_ticks()
    finally:
        inside.write_text(script)
    daemon.virsh("restore", image)
    suspended.wait_for_ticks()
    assert daemon.sevhop("recover").returncode == 0
