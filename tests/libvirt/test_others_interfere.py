"""Somebody else does something with the domain in the middle of its upgrade."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from tests.support.guests.daemon import Daemon, DomainGuest, kill
from tests.support.guests.running import wait_until

from ..conftest import some_of
from .conftest import StartDomain
from .holding import Checkpoint, PausedUpgrade


def image(daemon: Daemon) -> Path:
    """The save image of the only hop."""
    [name] = [name for name in daemon.left_over() if name.endswith("/image")]
    return Path("/run/sevhop", name)


def assert_unharmed(daemon: Daemon, guest: DomainGuest, emulator: Path) -> None:
    """The guest runs there and lost nothing, and nothing is left."""
    assert guest.state == "running"
    assert guest.emulator() == guest.emulator("--inactive") == str(emulator)
    guest.wait_for_ticks()
    wait_until(lambda: daemon.left_over() == [], 30, "the keeper exits")


def open_files(pid: int) -> list[str]:
    """What a process has open, as far as it is still there."""
    with contextlib.suppress(FileNotFoundError):
        return [os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")]
    return []


RESUMES = {
    "before it is saved": ("save", ["resume"]),
    "and pauses it before it is saved": ("save", ["resume", "suspend"]),
    "when it is saved": ("terminate", ["resume"]),
    "and pauses it when it is saved": ("terminate", ["resume", "suspend"]),
}


@pytest.mark.parametrize("when", some_of(RESUMES, 2))
def test_guest_survives_being_resumed_by_others(
    daemon: Daemon, start: StartDomain, old: Path, new: Path, when: str
) -> None:
    """Then what was saved is not the guest any more."""
    guest = start()
    guest.wait_for_ticks()
    pid = guest.pid
    phase, commands = RESUMES[when]
    with PausedUpgrade.at(phase, guest, new, "--no-transit") as upgrade:
        for command in commands:
            daemon.virsh(command, guest.name)
            if command == "resume":
                guest.wait_for_ticks()
        report = upgrade.finish()
    if when == "and pauses it before it is saved":
        # What is saved is the guest as it is then.
        assert (report["status"], report["outcome"]) == (0, "done"), report
        assert_unharmed(daemon, guest, new)
        return
    assert (report["status"], report["outcome"]) == (3, "rolled-back"), report
    assert "another client has resumed" in report["reason"]
    assert guest.pid == pid
    assert_unharmed(daemon, guest, old)
    assert daemon.upgrade(guest.name, "--no-transit", "--emulator", new)["outcome"] == "done"
    assert_unharmed(daemon, guest, new)


def test_guest_paused_by_others_stays_paused(daemon: Daemon, start: StartDomain, new: Path) -> None:
    """It stays paused."""
    guest = start()
    guest.wait_for_ticks()
    with PausedUpgrade.at("prepare", guest, new, "--no-transit") as upgrade:
        daemon.virsh("suspend", guest.name)
        report = upgrade.finish()
    assert report["outcome"] == "done", report
    assert guest.state == "paused"
    daemon.virsh("resume", guest.name)
    assert_unharmed(daemon, guest, new)


@pytest.mark.parametrize("phase", some_of(["prepare", "save"]))
def test_upgrade_completes_if_others_dump_the_memory(daemon: Daemon, start: StartDomain, new: Path, phase: str) -> None:
    """That stops the guest, unless it has been, and leaves it as it was."""
    guest = start()
    guest.wait_for_ticks()
    with PausedUpgrade.at(phase, guest, new, "--no-transit") as upgrade:
        daemon.virsh("dump", "--memory-only", guest.name, f"/run/{guest.name}.core")
        report = upgrade.finish()
    (daemon.root / f"run/{guest.name}.core").unlink()
    assert (report["status"], report["outcome"]) == (0, "done"), report
    assert_unharmed(daemon, guest, new)


@pytest.mark.parametrize("phase", some_of(["prepare", "save", "terminate"], 2))
def test_upgrade_rolls_back_if_others_save_the_domain(
    daemon: Daemon, start: StartDomain, old: Path, new: Path, phase: str
) -> None:
    """Then the guest is in that image, and nowhere else. (QEMU 7.2 exits when it saves its state a second time.)"""
    guest = start(emulator=new)
    guest.wait_for_ticks()
    saved = f"/run/{guest.name}.saved"
    with PausedUpgrade.at(phase, guest, old, "--no-transit") as upgrade:
        daemon.virsh("save", guest.name, saved)
        report = upgrade.finish()
    assert (report["status"], report["outcome"]) == (3, "rolled-back"), report
    assert report["guest_state"] == "saved to disk by another client"
    assert "another client has saved the domain" in report["reason"]
    assert guest.state == "shut off"
    daemon.virsh("restore", "--running", saved)
    (daemon.root / saved.lstrip("/")).unlink()
    assert_unharmed(daemon, guest, new)


def test_upgrade_rolls_back_if_others_change_the_domain(
    daemon: Daemon, start: StartDomain, old: Path, new: Path
) -> None:
    """The destination would use a disk that is not the guest's any more."""
    guest = start()
    guest.wait_for_ticks()
    with PausedUpgrade.at("prepare", guest, new, "--no-transit") as upgrade:
        daemon.virsh("snapshot-create-as", guest.name, "snapshot", "--disk-only", "--no-metadata")
        report = upgrade.finish()
    assert (report["status"], report["outcome"]) == (3, "rolled-back"), report
    assert "another client has changed the domain" in report["reason"]
    assert_unharmed(daemon, guest, old)
    assert daemon.upgrade(guest.name, "--no-transit", "--emulator", new)["outcome"] == "done"
    assert_unharmed(daemon, guest, new)


@pytest.mark.parametrize(
    ("phase", "how"), [("prepare", "destroys it"), ("stop", "kills its QEMU"), ("save", "kills its QEMU")]
)
def test_guest_is_lost_if_others_terminate_unsaved_source(
    daemon: Daemon, start: StartDomain, new: Path, phase: str, how: str
) -> None:
    """Then the guest is lost, as it would have been without an upgrade."""
    guest = start()
    guest.wait_for_ticks()
    with PausedUpgrade.at(phase, guest, new, "--no-transit") as upgrade:
        if how == "destroys it":
            daemon.virsh("destroy", guest.name)
        else:
            kill(guest.pid)
        report = upgrade.finish()
    assert (report["status"], report["outcome"]) == (5, "guest-lost"), report
    assert guest.state == "shut off"
    assert daemon.left_over() == []
    daemon.virsh("start", guest.name)
    assert daemon.upgrade(guest.name, "--no-transit", "--emulator", new)["outcome"] == "done"


@pytest.mark.parametrize("how", some_of(["destroys it", "kills its QEMU", "tries to save it"], 2))
def test_upgrade_completes_if_others_terminate_saved_source(
    daemon: Daemon, start: StartDomain, new: Path, how: str
) -> None:
    """Then it is not needed any more."""
    guest = start()
    guest.wait_for_ticks()
    with PausedUpgrade.at("terminate", guest, new, "--no-transit") as upgrade:
        if how == "destroys it":
            daemon.virsh("destroy", guest.name)
        elif how == "kills its QEMU":
            kill(guest.pid)
        else:
            assert daemon.run("virsh", "save", guest.name, "/run/saved").returncode == 1
        report = upgrade.finish()
    assert (report["status"], report["outcome"]) == (0, "done"), report
    assert_unharmed(daemon, guest, new)


@pytest.mark.parametrize("behind", [False, True], ids=["before the commit", "after the commit"])
def test_upgrade_rolls_back_if_others_kill_the_destination(
    daemon: Daemon, start: StartDomain, old: Path, new: Path, behind: bool
) -> None:
    """The keeper has the guest until it runs: it is restored."""
    guest = start()
    guest.wait_for_ticks()
    with (
        Checkpoint.at(daemon, guest, "started/begin", after=behind) as checkpoint,
        PausedUpgrade.at("restore", guest, new, "--no-transit") as upgrade,
    ):
        upgrade.resume()
        checkpoint.wait()
        kill(guest.pid)
        checkpoint.release()
        report = upgrade.finish()
    assert (report["status"], report["outcome"]) == (3, "rolled-back"), report
    assert_unharmed(daemon, guest, old)
    assert daemon.upgrade(guest.name, "--no-transit", "--emulator", new)["outcome"] == "done"
    assert_unharmed(daemon, guest, new)


def test_upgrade_completes_if_others_restore_the_domain_first(daemon: Daemon, start: StartDomain, new: Path) -> None:
    """It cannot be started while it is suspended in the keeper; a restore is as good as our own."""
    guest = start()
    guest.wait_for_ticks()
    with PausedUpgrade.at("restore", guest, new, "--no-transit") as upgrade:
        refused = daemon.run("virsh", "start", guest.name)
        assert refused.returncode == 1
        assert "virsh restore" in refused.stderr
        daemon.virsh("restore", image(daemon))
        report = upgrade.finish()
    assert (report["status"], report["outcome"]) == (0, "done"), report
    assert_unharmed(daemon, guest, new)


def test_start_by_others_is_refused_during_restore(daemon: Daemon, start: StartDomain, new: Path) -> None:
    """The domain is not active yet then: only the hook can refuse."""
    guest = start()
    guest.wait_for_ticks()
    with (
        Checkpoint.at(daemon, guest, "restore/begin", after=True) as checkpoint,
        PausedUpgrade.at("restore", guest, new, "--no-transit") as upgrade,
    ):
        upgrade.resume()
        checkpoint.wait()
        refused = daemon.run("virsh", "start", guest.name)
        checkpoint.release()
        report = upgrade.finish()
    assert refused.returncode == 1
    assert "virsh restore" in refused.stderr
    assert (report["status"], report["outcome"]) == (0, "done"), report
    assert_unharmed(daemon, guest, new)


def test_second_restore_is_refused_during_restore(daemon: Daemon, start: StartDomain, new: Path) -> None:
    """Whoever is first gets it; the other one sees that."""
    guest = start()
    guest.wait_for_ticks()
    with (
        Checkpoint.at(daemon, guest, "started/begin") as checkpoint,
        PausedUpgrade.at("restore", guest, new, "--no-transit") as upgrade,
    ):
        theirs = daemon.start_command("virsh", "restore", image(daemon))
        checkpoint.wait()
        refused = daemon.run("virsh", "restore", image(daemon))
        upgrade.resume()
        checkpoint.release()
        _, err = theirs.communicate(timeout=60)
        report = upgrade.finish()
    assert refused.returncode == 1
    assert "is being restored already" in refused.stderr
    assert theirs.returncode == 0, err
    assert (report["status"], report["outcome"]) == (0, "done"), report
    assert_unharmed(daemon, guest, new)


def test_mappings_outlive_the_source(daemon: Daemon, start: StartDomain, new: Path) -> None:
    """Nobody waits until they are taken down, which is what grows with the memory: the keeper has them."""
    guest = start()
    guest.wait_for_ticks()
    pagemap = f"/proc/{guest.pid}/pagemap"
    with PausedUpgrade.at("restore", guest, new, "--no-transit") as upgrade:
        keepers = [pid for pid in daemon.processes() if pagemap in open_files(pid)]
        assert [Path(f"/proc/{pid}/comm").read_text() for pid in keepers] == ["sevhop-keeper\n"]
        report = upgrade.finish()
    assert (report["status"], report["outcome"]) == (0, "done"), report
    assert_unharmed(daemon, guest, new)
