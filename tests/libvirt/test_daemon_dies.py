"""libvirt is killed in the middle of an upgrade, and started again. The guest runs on, in one QEMU or the other."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.guests.daemon import Daemon, DomainGuest
from tests.support.guests.running import wait_until

from .conftest import StartDomain
from .holding import Checkpoint, HeldUpgrade


def assert_unharmed(daemon: Daemon, guest: DomainGuest, emulator: Path) -> None:
    """The guest runs and lost nothing, nothing is left behind, and another upgrade works."""
    # A daemon that was started again answers before it has asked QEMU.
    wait_until(lambda: guest.state == "running", 30, "libvirt knows that the guest runs")
    assert guest.emulator() == guest.emulator("--inactive") == str(emulator)
    guest.wait_for_ticks()
    assert daemon.left_over() == []
    # What the source was given to write to; the other one is libvirt's.
    descriptors = [fd for fdset in guest.monitor("query-fdsets")["return"] for fd in fdset["fds"]]
    assert [fd.get("opaque") for fd in descriptors] == ["serial0-source"]
    assert daemon.upgrade(guest.name)["outcome"] == "done"
    guest.wait_for_ticks()


#: libvirt takes its time to come back.
THE_REST = pytest.mark.faults
#: By phase; without libvirt there is no rehearsal, and nothing has been done before it.
ENDS = {
    **dict.fromkeys(("hold", "rehearse"), (1, "refused")),
    **dict.fromkeys(("prepare", "freeze", "save", "retire"), (3, "undone")),
}


@pytest.mark.parametrize(
    "phase", [pytest.param(phase, marks=[] if phase in ("prepare", "save") else [THE_REST]) for phase in ENDS]
)
def test_before_the_source_has_ended(daemon: Daemon, start: StartDomain, old: Path, new: Path, phase: str) -> None:
    """The upgrade finds the next daemon by itself, and puts everything back."""
    guest = start()
    guest.wait_for_ticks()
    pid = guest.pid
    with HeldUpgrade.at(phase, guest, new) as upgrade:
        daemon.restart()
        report = upgrade.go_on()
    assert (report["status"], report["outcome"]) == ENDS[phase], report
    assert guest.pid == pid
    assert_unharmed(daemon, guest, old)


def test_when_the_source_has_ended(daemon: Daemon, start: StartDomain, old: Path, new: Path) -> None:
    """The restore is asked of a daemon that is not there any more; the next one brings the guest back."""
    guest = start()
    guest.wait_for_ticks()
    with HeldUpgrade.at("restore", guest, new) as upgrade:
        daemon.restart()
        report = upgrade.go_on()
    assert (report["status"], report["outcome"]) == (3, "undone"), report
    assert_unharmed(daemon, guest, old)


@pytest.mark.parametrize(
    ("step", "behind"),
    [
        pytest.param("restore/begin", True, id="before there is a destination", marks=THE_REST),
        pytest.param("start/begin", True, id="before the destination starts", marks=THE_REST),
        pytest.param("started/begin", False, id="before the commit"),
        pytest.param("started/begin", True, id="behind the commit"),
    ],
)
def test_in_the_middle_of_the_restore(
    daemon: Daemon, start: StartDomain, old: Path, new: Path, step: str, behind: bool
) -> None:
    guest = start()
    guest.wait_for_ticks()
    with (
        Checkpoint.at(daemon, guest, step, behind=behind) as checkpoint,
        HeldUpgrade.at("restore", guest, new) as upgrade,
    ):
        upgrade.resume()
        checkpoint.wait()
        daemon.restart()
        report = upgrade.go_on()
    # Whether a destination that has everything is used or ended is libvirt's to decide.
    expected = ("done", "undone") if behind and step == "started/begin" else ("undone",)
    assert report["outcome"] in expected, report
    assert_unharmed(daemon, guest, new if report["outcome"] == "done" else old)


def test_while_the_definition_is_changed(daemon: Daemon, start: StartDomain, old: Path, new: Path) -> None:
    guest = start()
    guest.wait_for_ticks()
    with HeldUpgrade.at("define", guest, new) as upgrade:
        daemon.restart()
        report = upgrade.go_on()
    assert (report["status"], report["outcome"], report["notes"]) == (0, "done", []), report
    assert_unharmed(daemon, guest, new)


def test_killed_when_the_guest_is_held(daemon: Daemon, start: StartDomain, new: Path) -> None:
    guest = start()
    guest.wait_for_ticks()
    report = daemon.upgrade(guest.name, "--emulator", new, "--prepare")
    daemon.restart()
    daemon.virsh("restore", report["image"])
    guest.wait_for_ticks()
    assert daemon.sevhop("recover").returncode == 0


def test_it_does_not_come_back(daemon: Daemon, start: StartDomain, old: Path, new: Path) -> None:
    """Then the guest is resumed without it."""
    guest = start()
    guest.wait_for_ticks()
    pid = guest.pid
    with HeldUpgrade.at("save", guest, new) as upgrade, daemon.gone():
        report = upgrade.go_on()
        assert (report["status"], report["outcome"]) == (3, "undone"), report
        guest.wait_for_ticks()
    assert guest.pid == pid
    assert_unharmed(daemon, guest, old)
