"""A domain that has lived: with snapshots, other disks, cards and settings than it was started with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.guests.build import Unavailable
from tests.support.guests.daemon import Daemon
from tests.support.guests.enclosure import GUESTS

from .conftest import StartDomain
from .lived import LivedInDomain


@pytest.fixture
def guest(daemon: Daemon, start: StartDomain, tmp_path: Path) -> LivedInDomain:
    return LivedInDomain.started(daemon, start, f"lived-{tmp_path.name[-20:]}")


def test_lived_in_guest_is_unchanged_after_upgrades(daemon: Daemon, guest: LivedInDomain, old: Path, new: Path) -> None:
    for emulator in (new, old):
        report = daemon.upgrade(guest.name, "--emulator", emulator)
        assert report["outcome"] == "done", str(report)
        guest.see_unchanged()
        guest.wait_for_ticks()
        for what in ("remove_bitmap", "commit", "unplug_disk", "medium") if emulator == new else ():
            guest.life.do(what)
        guest.remember()


def test_paused_lived_in_guest_is_unchanged_after_upgrades(
    daemon: Daemon, guest: LivedInDomain, old: Path, new: Path
) -> None:
    guest.life.do("stop")
    guest.remember()
    for emulator in (new, old):
        report = daemon.upgrade(guest.name, "--emulator", emulator)
        assert report["outcome"] == "done", str(report)
        guest.see_unchanged()
    guest.life.do("cont")
    guest.wait_for_ticks()


CARDS = {
    "bridge": "<interface type='bridge'><source bridge='{}'/><model type='virtio'/><driver queues='2'/></interface>",
    "ethernet": "<interface type='ethernet'><model type='e1000e'/></interface>",
}


@pytest.mark.parametrize("kind", CARDS)
def test_plugged_cards_are_unchanged_after_upgrades(
    kind: str, daemon: Daemon, guest: LivedInDomain, old: Path, new: Path
) -> None:
    """libvirt gives it the name of the card that was unplugged, which is still on the command line."""
    file = f"{GUESTS}/{guest.name}-card.xml"
    try:
        with daemon.bridge() as bridge:
            (daemon.root / file.lstrip("/")).write_text(CARDS[kind].format(bridge))
            daemon.virsh("attach-device", guest.name, file, "--live")
            guest.remember()
            for emulator in (new, old):
                report = daemon.upgrade(guest.name, "--emulator", emulator)
                assert report["outcome"] == "done", str(report)
                guest.see_unchanged()
            guest.wait_for_ticks()
            guest.end()
    except Unavailable as err:
        pytest.skip(str(err))
