"""``sevhop recover`` in another emulator, late, after a change of an image, or not at all: ``--discard``."""

from __future__ import annotations

import os
import pty
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from sevhop.report import LONG_STOP_MS

from tests.support.guests.daemon import Daemon, DomainGuest
from tests.support.guests.enclosure import GUESTS
from tests.support.guests.running import processes_of_domain, wait_until

from .conftest import StartDomain
from .failing import wrapper
from .transit_guest import TransitGuest, kill_keeper_and_supervisor, measured

FAILS = 'case "$*" in *-incoming*) echo "qemu: no, thanks" >&2; exit 1;; esac'


def assert_starts_again(guest: DomainGuest) -> None:
    """From its disks: it begins to count again."""
    before = guest.seen().restarts
    guest.daemon.virsh("start", guest.name)
    wait_until(lambda: guest.seen().restarts == before + 1, 60, "the guest begins again")


def test_recover_restores_in_the_chosen_emulator_alone(
    daemon: Daemon, transit: TransitGuest, old: Path, new: Path, record_property: Any
) -> None:
    name = transit.guest.name
    failing, chosen = wrapper(daemon, "qemu-fails", new, FAILS), wrapper(daemon, "qemu-chosen", new, ":")
    with measured(transit, record_property):
        transit.enter(new)
        refused = daemon.sevhop("recover", name, "--emulator", "/nowhere/qemu")
        assert (refused.returncode, "cannot restore the domain in /nowhere/qemu" in refused.stderr) == (1, True), (
            refused
        )
        assert "nothing was touched" in refused.stderr
        transit.assert_in_transit()
        # Neither of those that were recorded is tried after it, although they work.
        failed = daemon.sevhop("recover", name, "--emulator", failing)
        assert (failed.returncode, f"{failing}: " in failed.stdout) == (4, True), failed
        assert f"{old}: " not in failed.stdout
        transit.assert_in_transit()
        done = daemon.sevhop("recover", name, "--emulator", chosen)
        assert done.returncode == 0, done
        transit.assert_arrived(chosen)


@pytest.mark.parametrize("keeper", ["with a keeper", "without"])
def test_discard_ends_the_guest_in_the_transit(daemon: Daemon, transit: TransitGuest, new: Path, keeper: str) -> None:
    """It is asked for on a terminal, or by --yes; then libvirt may start the domain."""
    name = transit.guest.name
    transit.enter(new)
    if keeper == "without":
        kill_keeper_and_supervisor(daemon)
    unasked = daemon.sevhop("recover", name, "--discard")
    assert (unasked.returncode, "--yes" in unasked.stderr) == (2, True), unasked
    transit.guest.wait_for_ticks()
    assert daemon.run("virsh", "start", name).returncode != 0
    done = daemon.sevhop("recover", name, "--discard", "--yes")
    assert (done.returncode, "was given up" in done.stdout) == (0, True), done
    wait_until(lambda: processes_of_domain(name) == [], 30, "the transit ends")
    wait_until(lambda: daemon.left_over() == [], 30, "nothing is left")
    assert_starts_again(transit.guest)
    assert daemon.sevhop("recover").stdout == "no interrupted hop was found\n"


def test_discard_asks_on_a_terminal(daemon: Daemon, transit: TransitGuest, new: Path) -> None:
    """Whoever does not agree keeps the guest."""
    transit.enter(new)
    ours, theirs = pty.openpty()
    try:
        command = daemon.start_command(
            *(sys.executable, "-m", "sevhop.cli", "recover", transit.guest.name, "--discard"),
            terminal=theirs,
        )
        shown = b""
        while b"[y/N]" not in shown:
            shown += os.read(ours, 4096)
        assert f"the guest runs in the transit (process {transit.transit})".encode() in shown
        os.write(ours, b"n\n")
        assert command.wait(60) == 1
    finally:
        os.close(ours)
        os.close(theirs)
    transit.assert_in_transit()
    assert daemon.sevhop("recover").returncode == 0
    transit.assert_arrived(new)


@pytest.fixture
def suspended(daemon: Daemon, start: StartDomain, new: Path) -> DomainGuest:
    """A guest that is suspended in the keeper, for an emulator that works."""
    guest = start()
    guest.wait_for_ticks()
    report = daemon.upgrade(guest.name, "--emulator", new, "--no-transit", "--no-rehearsal", "--prepare")
    assert report["outcome"] == "prepared", report
    return guest


def test_suspended_guest_is_restored_late_only_if_somebody_asks(
    daemon: Daemon, suspended: DomainGuest, new: Path
) -> None:
    began = time.monotonic()
    late = daemon.sevhop("recover", suspended.name, "--unattended", "--max-age", "0.001")
    assert (late.returncode, "is not restored unasked" in late.stdout) == (4, True), late
    again = daemon.sevhop("recover", suspended.name, "--unattended", "--max-age", "0.001")
    assert (again.returncode, "not tried again yet" in again.stdout) == (4, True), again
    assert "not restored unasked" in daemon.sevhop("status", suspended.name).stdout
    # By then it has been stopped for so long that it is reported.
    wait_until(lambda: time.monotonic() > began + LONG_STOP_MS / 1e3, 10, "the guest was stopped for long")
    done = daemon.sevhop("recover", suspended.name)
    assert (done.returncode, "the guest was stopped for" in done.stdout) == (0, True), done
    assert "its clock was not set: it has no guest agent" in done.stdout
    assert suspended.emulator() == str(new)
    suspended.wait_for_ticks()
    wait_until(lambda: daemon.left_over() == [], 30, "nothing is left")


def test_suspended_guest_is_not_restored_after_a_change_of_its_disk(daemon: Daemon, suspended: DomainGuest) -> None:
    disk = suspended.file("qcow2")
    with disk.open("r+b") as file:
        first = file.read(4)
        file.seek(0)
        file.write(first)  # nothing is different, but it was written to
    refused = daemon.sevhop("recover", suspended.name)
    reason = f"{GUESTS}/{suspended.name}.qcow2: it was written to"
    assert (refused.returncode, reason in refused.stdout) == (4, True), refused
    assert suspended.state == "shut off"
    image = refused.stdout.partition("virsh restore ")[2].partition(";")[0]
    daemon.virsh("restore", image)
    suspended.wait_for_ticks()
    assert daemon.sevhop("recover").returncode == 0


def test_discard_ends_the_guest_in_the_keeper(daemon: Daemon, suspended: DomainGuest) -> None:
    assert daemon.run("virsh", "start", suspended.name).returncode != 0
    done = daemon.sevhop("recover", suspended.name, "--discard", "--yes", "--json")
    assert (done.returncode, '"discarded"' in done.stdout) == (0, True), done
    assert daemon.left_over() == []
    assert_starts_again(suspended)
    left = daemon.sevhop("recover", suspended.name, "--discard", "--yes")
    assert (left.returncode, f"no hop of {suspended.name} was interrupted" in left.stderr) == (1, True), left


def damaged_journal(daemon: Daemon, guest: DomainGuest) -> Path:
    """That of the domain's hop, of which nothing can be read any more."""
    directory = daemon.root / "var/lib/sevhop/journal"
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"domain-{daemon.virsh('domuuid', guest.name)}.journal"
    path.write_bytes(b"{}\n")
    return path


def test_guest_in_the_transit_is_given_up_without_its_journal(daemon: Daemon, transit: TransitGuest, new: Path) -> None:
    """Everybody reports the journal; what it does not have any more is found otherwise."""
    name = transit.guest.name
    transit.enter(new)
    path = damaged_journal(daemon, transit.guest)
    for words in (["recover"], ["recover", name], ["status"]):
        done = daemon.sevhop(*words)
        hint = f"sevhop recover {path.name} --discard"
        assert (done.returncode, done.stdout.count(hint)) == (4, 1), done
    transit.guest.wait_for_ticks()
    done = daemon.sevhop("recover", path.name, "--discard", "--yes")
    assert (done.returncode, "was given up: libvirt may start" in done.stdout) == (0, True), done
    wait_until(lambda: processes_of_domain(name) == [], 30, "the transit ends")
    wait_until(lambda: daemon.left_over() == [], 30, "nothing is left")
    assert_starts_again(transit.guest)


def test_guest_in_libvirts_qemu_outlives_its_damaged_journal(daemon: Daemon, start: StartDomain, new: Path) -> None:
    guest = start()
    guest.wait_for_ticks()
    path = damaged_journal(daemon, guest)
    refused = daemon.upgrade(guest.name, "--emulator", new)
    assert (refused["outcome"], f"{path.name} --discard" in refused["reason"]) == ("refused", True), refused
    done = daemon.sevhop("recover", guest.name, "--discard", "--yes")
    assert (done.returncode, "the guest stays in libvirt's QEMU" in done.stdout) == (0, True), done
    guest.wait_for_ticks()
    assert daemon.upgrade(guest.name, "--emulator", new)["outcome"] == "done"
    guest.wait_for_ticks()
