"""A guest that is suspended in the keeper is identified by UUID and process, not by its name: another may get that."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.guests.daemon import Daemon, DomainGuest
from tests.support.guests.enclosure import GUESTS
from tests.support.guests.running import wait_until

from .conftest import StartDomain

_SCRIPT = "etc/libvirt/hooks/qemu.d/sevhop"


def prepared(daemon: Daemon, guest: DomainGuest, new: Path) -> str:
    """Suspend it in the keeper. :return: the save image."""
    guest.wait_for_ticks(3)
    report = daemon.upgrade(guest.name, "--no-transit", "--emulator", new, "--prepare")
    assert report["outcome"] == "prepared", report
    return str(report["image"])


def assert_keeps_running(daemon: Daemon, guest: DomainGuest) -> None:
    """It resumes, and nothing of it is lost."""
    assert daemon.recover_one(guest.name)["status"] == 0
    assert guest.state == "running"
    guest.wait_for_ticks()
    wait_until(lambda: daemon.left_over() == [], 30, "the keeper exits")


@pytest.mark.parametrize("transient", [True, False], ids=["created again", "defined again"])
def test_domain_of_the_same_name_is_not_started(daemon: Daemon, start: StartDomain, new: Path, transient: bool) -> None:
    """The same file without a UUID, as cluster managers and playbooks have it: libvirt makes another UUID."""
    guest = start(transient=transient)
    uuid, image = daemon.virsh("domuuid", guest.name), prepared(daemon, guest, new)
    if not transient:
        daemon.virsh("undefine", guest.name)
        daemon.virsh("define", GUESTS / f"{guest.name}.xml")
        assert daemon.virsh("domuuid", guest.name) != uuid
    start_it = ["create", f"{GUESTS}/{guest.name}.xml"] if transient else ["start", guest.name]
    refused = daemon.run("virsh", *start_it)
    assert refused.returncode == 1
    assert f"has reserved its name for the domain with UUID {uuid}" in refused.stderr
    assert f"virsh restore {image}" in refused.stderr
    if not transient:
        # libvirt has no room for both. The guest stays where it is.
        stuck = daemon.recover_one(guest.name)
        assert (stuck["status"], stuck["result"]) == (4, "manual"), stuck
        daemon.virsh("undefine", guest.name)
    assert_keeps_running(daemon, guest)
    assert daemon.virsh("domuuid", guest.name) == uuid


def test_renamed_domain_is_not_started(daemon: Daemon, start: StartDomain, new: Path) -> None:
    guest = start()
    image = prepared(daemon, guest, new)
    daemon.virsh("domrename", guest.name, "renamed")
    try:
        refused = daemon.run("virsh", "start", "renamed")
        assert refused.returncode == 1
        assert f"virsh restore {image}" in refused.stderr
    finally:
        daemon.run("virsh", "destroy", "renamed")
        daemon.virsh("domrename", "renamed", guest.name)
    assert_keeps_running(daemon, guest)


@pytest.mark.parametrize("uuid", ["the same", "another"])
def test_recover_terminates_no_guest_of_others(daemon: Daemon, start: StartDomain, new: Path, uuid: str) -> None:
    """The hook was missing for a moment: somebody has cleaned up its directory."""
    guest = start()
    prepared(daemon, guest, new)
    if uuid == "another":
        daemon.virsh("undefine", guest.name)
        daemon.virsh("define", GUESTS / f"{guest.name}.xml")
    script = daemon.root / _SCRIPT
    text = script.read_text()
    script.write_text("#!/bin/sh\n")
    daemon.virsh("start", guest.name)
    script.write_text(text)
    pid = guest.pid
    stuck = daemon.recover_one(guest.name)
    assert (stuck["status"], stuck["result"]) == (4, "manual"), stuck
    if uuid == "the same":
        assert f"(process {pid}) while its guest is suspended in the keeper" in stuck["detail"]
    assert Path(f"/proc/{pid}").exists()
    assert guest.pid == pid
    daemon.virsh("destroy", guest.name)
    if uuid == "another":
        daemon.virsh("undefine", guest.name)
    assert daemon.recover_one(guest.name)["status"] == 0
    assert guest.state == "running"
    ticks = guest.seen().ticks
    wait_until(lambda: guest.seen().ticks > ticks, 30, "it counts on")
    wait_until(lambda: daemon.left_over() == [], 30, "the keeper exits")
