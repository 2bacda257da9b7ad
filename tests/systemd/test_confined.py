"""
AppArmor and systemd together, in the lab: what the units do with a domain that libvirt's profiles confine.

``tools/lab/run --kernel 6.12 --memory 8192 --timeout 7200 --show DIRECTORY env SEVHOP_PACKAGE=DIRECTORY/sevhop_….deb
.venv/bin/python3 -m pytest -m long tests/systemd/test_confined.py``, when the releases have been fetched: any test of
this directory does that.
"""

from __future__ import annotations

import pytest

from tests.libvirt.holding import Checkpoint
from tests.support.guests import apparmor
from tests.support.guests.daemon import DomainGuest
from tests.support.guests.running import wait_until

from .conftest import PATIENCE, Host
from .prepared import complete, prepare

pytestmark = pytest.mark.long


def assert_confined(host: Host, guest: DomainGuest) -> None:
    """The guest runs in libvirt's QEMU, by its own profile, of which there is no copy."""
    guest.wait_for_ticks()
    profile = apparmor.profile_of(guest)
    assert apparmor.confinement(guest.pid, host.root) == apparmor.label(profile)
    wait_until(lambda: apparmor.copies(profile) == [], PATIENCE, "the copy is removed")


def test_service_upgrades_a_confined_domain(confined: Host, guest: DomainGuest) -> None:
    assert_confined(confined, guest)
    before = guest.pid
    confined.replace_emulator()
    # In emulation it takes longer than a command may. Its job is there until it has ended.
    confined.must("start", "--no-block", "sevhop-upgrade.service")
    wait_until(lambda: confined.release.show("sevhop-upgrade.service", "Job") in ("", "0"), PATIENCE, "it has ended")
    log = confined.log("--unit=sevhop-upgrade.service", "--unit=libvirtd.service")
    assert confined.release.show("sevhop-upgrade.service", "Result") == "success", log
    assert guest.pid != before, log
    assert_confined(confined, guest)


def test_confined_transit_is_in_its_own_scope(confined: Host, guest: DomainGuest) -> None:
    """It outlives the unit of the command, by a copy of the profile."""
    image = prepare(confined, guest)
    guest.wait_for_ticks()
    (transit,) = apparmor.confined_by(apparmor.copy(apparmor.profile_of(guest)))
    (scope,) = confined.units("sevhop-transit-*")
    assert confined.release.processes_of(scope) == [transit]
    complete(confined, guest, image)
    assert_confined(confined, guest)


def test_timer_recovers_a_confined_domain(confined: Host, guest: DomainGuest) -> None:
    """An upgrade that was killed with its guest in the transit. The unit's own limits let it remove the profile."""
    confined.replace_emulator()
    profile = apparmor.profile_of(guest)
    with Checkpoint.at(confined, guest, "stopped/end") as checkpoint:
        confined.must("start", "--no-block", "sevhop-upgrade.service")
        checkpoint.wait()
        confined.must("kill", "--signal=KILL", "sevhop-upgrade.service")
        guest.wait_for_ticks()
        assert apparmor.confined_by(apparmor.copy(profile))
    confined.wait_until_recovered()
    assert guest.state == "running"
    assert_confined(confined, guest)
