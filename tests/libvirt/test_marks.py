"""
What an upgrade leaves in the XML of the running domain, and so in copies of it, has no effect: they work as those of a
domain that has never hopped, also on a host without sevhop.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from sevhop_qmp import adopt_library

from tests.support.guests.daemon import Daemon, DomainGuest
from tests.support.guests.enclosure import GUESTS
from tests.support.guests.running import wait_until

from .conftest import StartDomain


@pytest.fixture
def upgraded(daemon: Daemon, start: StartDomain, new: Path) -> DomainGuest:
    """A domain that has hopped."""
    guest = start()
    guest.wait_for_ticks()
    assert daemon.upgrade(guest.name, "--emulator", new)["outcome"] == "done"
    guest.wait_for_ticks()
    assert "SEVHOP_" in guest.xml(), "otherwise there is nothing to test"
    return guest


def test_snapshot_with_memory_is_reverted_to(daemon: Daemon, upgraded: DomainGuest) -> None:
    daemon.virsh("snapshot-create-as", upgraded.name, "with-memory")
    try:
        later = upgraded.wait_for_ticks(50).last
        daemon.virsh("snapshot-revert", upgraded.name, "with-memory")
        assert upgraded.state == "running"
        upgraded.file("log").write_text("")
        wait_until(lambda: upgraded.seen().ticks >= 3, 30, "it counts on")
        assert later - 100 < upgraded.seen().last, "it did not begin again"
    finally:
        daemon.run("virsh", "snapshot-delete", upgraded.name, "with-memory")


@pytest.mark.parametrize("how", ["managed save", "save"])
def test_saved_domain_is_restored_without_sevhop(daemon: Daemon, upgraded: DomainGuest, how: str) -> None:
    image = GUESTS / f"{upgraded.name}.saved"
    done = daemon.sevhop("uninstall")
    assert done.returncode == 0, done
    try:
        ticks = upgraded.seen().ticks
        if how == "save":
            daemon.virsh("save", upgraded.name, image)
            daemon.virsh("restore", image)
        else:
            daemon.virsh("managedsave", upgraded.name)
            daemon.virsh("start", upgraded.name)
        assert upgraded.wait_for_ticks().ticks > ticks
    finally:
        daemon.install()


@pytest.mark.parametrize("library", ["there", "missing"])
def test_domain_is_defined_by_a_backup_of_its_xml(daemon: Daemon, upgraded: DomainGuest, library: str) -> None:
    xml = upgraded.xml("--security-info")
    assert str(adopt_library.path()) in xml
    if library == "missing":
        xml = xml.replace(str(adopt_library.path()), "/nonexistent/adopt.so")
    upgraded.file("backup").write_text(xml)
    daemon.virsh("destroy", upgraded.name)
    upgraded.file("log").unlink()
    daemon.virsh("define", GUESTS / f"{upgraded.name}.backup")
    daemon.virsh("start", upgraded.name)
    upgraded.wait_for_ticks()
