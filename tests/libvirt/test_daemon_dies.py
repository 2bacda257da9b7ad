"""libvirt is killed in the middle of an upgrade, and started again. The guest runs on, in one QEMU or the other."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.guests.daemon import Daemon, DomainGuest
from tests.support.guests.running import wait_until

from .conftest import StartDomain
from .holding import Checkpoint, PausedUpgrade


def assert_unharmed(daemon: Daemon, guest: DomainGuest, emulator: Path) -> None:
    """The guest runs and lost nothing, nothing is left, and another upgrade works."""
    # A daemon that was started again answers before it has asked QEMU.
    wait_until(lambda: guest.state == "running", 30, "libvirt knows that the guest runs")
    assert guest.emulator() == guest.emulator("--inactive") == str(emulator)
    guest.wait_for_ticks()
    assert daemon.left_over() == []
    # What the source was given to write to; the other one is libvirt's.
    descriptors = [fd for fdset in guest.monitor("query-fdsets")["return"] for fd in fdset["fds"]]
    assert [fd.get("opaque") for fd in descriptors] == ["serial0-source"]
    assert daemon.upgrade(guest.name, "--no-transit")["outcome"] == "done"
    guest.wait_for_ticks()


#: Without a transit, and libvirt takes its time to restart.
THE_REST = pytest.mark.faults
#: By phase; without libvirt there is no rehearsal, and nothing has been done before it.
ENDS = {
    **dict.fromkeys(("acquire", "rehearse"), (1, "refused")),
    **dict.fromkeys(("prepare", "stop", "save", "terminate"), (3, "rolled-back")),
}


@pytest.mark.parametrize("phase", [pytest.param(phase, marks=[] if phase == "save" else [THE_REST]) for phase in ENDS])
def test_guest_stays_in_source_if_daemon_dies_before_restore(
    daemon: Daemon, start: StartDomain, old: Path, new: Path, phase: str
) -> None:
    """The upgrade connects to the next daemon, and rolls everything back."""
    guest = start()
    guest.wait_for_ticks()
    pid = guest.pid
    with PausedUpgrade.at(phase, guest, new, "--no-transit") as upgrade:
        daemon.restart()
        report = upgrade.finish()
    assert (report["status"], report["outcome"]) == ENDS[phase], report
    assert guest.pid == pid
    assert_unharmed(daemon, guest, old)


@THE_REST
@pytest.mark.virtqemud
def test_upgrade_rolls_back_if_daemon_dies_after_source_exit(
    daemon: Daemon, start: StartDomain, old: Path, new: Path
) -> None:
    """The restore is asked of a daemon that is not there any more; the next one restores the guest."""
    guest = start()
    guest.wait_for_ticks()
    with PausedUpgrade.at("restore", guest, new, "--no-transit") as upgrade:
        daemon.restart()
        report = upgrade.finish()
    assert (report["status"], report["outcome"]) == (3, "rolled-back"), report
    assert_unharmed(daemon, guest, old)


@pytest.mark.parametrize(
    ("step", "behind"),
    [
        pytest.param("restore/begin", True, id="before there is a destination", marks=THE_REST),
        pytest.param("start/begin", True, id="before the destination starts", marks=THE_REST),
        pytest.param("started/begin", False, id="before the commit", marks=THE_REST),
        pytest.param("started/begin", True, id="after the commit"),
    ],
)
def test_guest_survives_daemon_death_during_restore(
    daemon: Daemon, start: StartDomain, old: Path, new: Path, step: str, behind: bool
) -> None:
    guest = start()
    guest.wait_for_ticks()
    with (
        Checkpoint.at(daemon, guest, step, after=behind) as checkpoint,
        PausedUpgrade.at("restore", guest, new, "--no-transit") as upgrade,
    ):
        upgrade.resume()
        checkpoint.wait()
        daemon.restart()
        report = upgrade.finish()
    # libvirt decides whether a destination that has everything is used or terminated.
    expected = ("done", "rolled-back") if behind and step == "started/begin" else ("rolled-back",)
    assert report["outcome"] in expected, report
    assert_unharmed(daemon, guest, new if report["outcome"] == "done" else old)


def test_upgrade_completes_if_daemon_dies_during_define(
    daemon: Daemon, start: StartDomain, old: Path, new: Path
) -> None:
    guest = start()
    guest.wait_for_ticks()
    with PausedUpgrade.at("define", guest, new, "--no-transit") as upgrade:
        daemon.restart()
        report = upgrade.finish()
    assert (report["status"], report["outcome"], report["notes"]) == (0, "done", []), report
    assert_unharmed(daemon, guest, new)


def test_guest_suspended_in_keeper_survives_daemon_death(daemon: Daemon, start: StartDomain, new: Path) -> None:
    guest = start()
    guest.wait_for_ticks()
    report = daemon.upgrade(guest.name, "--no-transit", "--emulator", new, "--prepare")
    daemon.restart()
    daemon.virsh("restore", report["image"])
    guest.wait_for_ticks()
    assert daemon.sevhop("recover").returncode == 0


@THE_REST
@pytest.mark.virtqemud
def test_guest_resumes_if_daemon_is_not_restarted(daemon: Daemon, start: StartDomain, old: Path, new: Path) -> None:
    """Then the guest is resumed without it."""
    guest = start()
    guest.wait_for_ticks()
    pid = guest.pid
    with PausedUpgrade.at("save", guest, new, "--no-transit") as upgrade, daemon.gone():
        report = upgrade.finish()
        assert (report["status"], report["outcome"]) == (3, "rolled-back"), report
        guest.wait_for_ticks()
    assert guest.pid == pid
    assert_unharmed(daemon, guest, old)
