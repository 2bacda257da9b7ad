"""Plain virsh, and what libvirt knows of a domain, after its upgrade."""

from __future__ import annotations

import os
import pty
import re
from pathlib import Path

import pytest

from tests.support.guests import linux
from tests.support.guests.build import Unavailable
from tests.support.guests.daemon import Daemon, DomainGuest
from tests.support.guests.running import wait_until

from .conftest import StartDomain

_COUNT = re.compile(rb"(?<=\n)[0-9a-f]{8}(?=\r?\n)")


@pytest.mark.virtqemud
def test_virsh_works_after_an_upgrade(daemon: Daemon, start: StartDomain, new: Path) -> None:
    guest = start()
    guest.wait_for_ticks()
    assert daemon.upgrade(guest.name, "--emulator", new)["outcome"] == "done"
    daemon.virsh("suspend", guest.name)
    assert guest.state == "paused"
    ticks = guest.seen().ticks
    daemon.virsh("resume", guest.name)
    guest.wait_for_ticks()
    assert guest.seen().ticks > ticks
    assert "block.0.name=vda" in daemon.virsh("domstats", guest.name)
    daemon.virsh("domblkstat", guest.name, "vda")
    daemon.restart()
    assert guest.state == "running"
    guest.wait_for_ticks()
    daemon.virsh("shutdown", guest.name)
    daemon.virsh("destroy", guest.name)
    daemon.virsh("start", guest.name)
    assert guest.monitor("query-version")["return"]["qemu"]["major"] == 10


def test_upgraded_domain_can_be_saved_and_restored(daemon: Daemon, start: StartDomain, new: Path) -> None:
    """What a hop has added to the domain must not matter to libvirt's own business."""
    guest = start()
    guest.wait_for_ticks()
    assert daemon.upgrade(guest.name, "--emulator", new)["outcome"] == "done"
    ticks = guest.wait_for_ticks().ticks
    done = daemon.run("virsh", "managedsave", guest.name)
    assert done.returncode == 0, done.stderr
    done = daemon.run("virsh", "start", guest.name)
    assert done.returncode == 0, done.stderr
    assert guest.wait_for_ticks().ticks > ticks


def console_counts(daemon: Daemon, guest: DomainGuest, wanted: int) -> list[int]:
    """The numbers that are seen on the console, which wants a terminal."""
    ours, theirs = pty.openpty()
    console = daemon.start_command("virsh", "console", guest.name, terminal=theirs)
    os.close(theirs)
    seen = b""
    try:
        while len(_COUNT.findall(seen)) < wanted:
            seen += os.read(ours, 4096)  # EIO when virsh exits
        os.write(ours, b"\x1d")
        console.wait(30)
    finally:
        console.kill()
        console.wait()
        os.close(ours)
    return [int(number, 16) for number in _COUNT.findall(seen)]


def test_console_shows_guest_output_after_upgrade(daemon: Daemon, start: StartDomain, new: Path) -> None:
    guest = start(serial="pty")
    ticks = guest.wait_for_ticks().ticks
    report = daemon.upgrade(guest.name, "--emulator", new)
    assert report["outcome"] == "done", report["reason"]
    counts = console_counts(daemon, guest, 10)
    assert counts == list(range(counts[0], counts[0] + len(counts)))
    assert counts[0] > ticks
    guest.wait_for_ticks()


def test_upgraded_guest_can_be_reset(daemon: Daemon, start: StartDomain, new: Path) -> None:
    """The guest starts again, from firmware that the new QEMU has in its place."""
    guest = start()
    guest.wait_for_ticks()
    assert daemon.upgrade(guest.name, "--emulator", new)["outcome"] == "done"
    pid = guest.pid
    daemon.virsh("reset", guest.name)
    wait_until(lambda: guest.seen().restarts == 1 and guest.seen().last > 20, 60, "the guest counts from 0 again")
    assert guest.pid == pid


def test_domain_keeps_its_metadata_and_snapshots(daemon: Daemon, start: StartDomain, new: Path) -> None:
    """Title, description, metadata, autostart and snapshots are the domain's, whatever QEMU it has."""
    guest = start()
    guest.wait_for_ticks()
    daemon.virsh("desc", guest.name, "--title", "--live", "--config", "The <title>")
    daemon.virsh("autostart", guest.name)
    daemon.virsh("snapshot-create-as", guest.name, "first", "--disk-only")
    assert daemon.upgrade(guest.name, "--emulator", new)["outcome"] == "done"
    assert daemon.virsh("desc", guest.name, "--title") == "The <title>"
    assert "keep &amp; this" in guest.xml()
    assert re.search(r"Autostart: +enable", daemon.virsh("dominfo", guest.name))
    assert daemon.virsh("snapshot-list", guest.name, "--name") == "first"
    guest.wait_for_ticks()
    daemon.virsh("autostart", guest.name, "--disable")
    daemon.virsh("snapshot-delete", guest.name, "first", "--metadata")


def test_transient_domain_survives_upgrades(daemon: Daemon, start: StartDomain, old: Path, new: Path) -> None:
    """libvirt forgets it when its QEMU exits; it is known again when the guest is restored."""
    guest = start(transient=True)
    guest.wait_for_ticks()
    uuid = daemon.virsh("domuuid", guest.name)
    for emulator in (new, old):
        report = daemon.upgrade(guest.name, "--emulator", emulator)
        assert (report["outcome"], report["notes"]) == ("done", []), report
        assert daemon.virsh("domuuid", guest.name) == uuid
        assert guest.emulator() == str(emulator)
        assert re.search(r"Persistent: +no", daemon.virsh("dominfo", guest.name))
        guest.wait_for_ticks()


def test_linux_guest_is_unharmed_until_its_shutdown(daemon: Daemon, start: StartDomain, old: Path, new: Path) -> None:
    """There, back and there again; then the guest obeys a shutdown, and its memory, network and disk are judged."""
    try:
        images = linux.images()
    except Unavailable as err:
        pytest.skip(f"no Linux guest: {err}")
    guest = start(accelerator="tcg", memory_mib=256, linux=images)
    guest.wait_for_ticks()
    for emulator in (new, old, new):
        report = daemon.upgrade(guest.name, "--emulator", emulator)
        assert report["outcome"] == "done", report
        guest.wait_for_ticks()
    daemon.virsh("shutdown", guest.name)
    wait_until(lambda: guest.state == "shut off", 120, "the guest switches itself off")
    verdict = guest.judge()
    assert verdict.writes
    assert verdict.unharmed, verdict
