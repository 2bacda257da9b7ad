"""The host's shutdown, and its next boot, while a guest is in the transit."""

from __future__ import annotations

import pytest

from tests.support.guests.daemon import DomainGuest
from tests.support.guests.running import wait_until

from .conftest import PATIENCE, Host
from .prepared import complete, prepare

pytestmark = pytest.mark.long


def test_inhibitor_is_there_as_long_as_the_guest_is_in_the_transit(host: Host, guest: DomainGuest) -> None:
    assert "sevhop" not in host.inhibitors()
    image = prepare(host, guest)
    (line,) = [line for line in host.inhibitors().splitlines() if "sevhop" in line]
    assert "shutdown:sleep" in line
    assert f"the guest of {guest.name} is between two QEMUs" in line
    assert line.split()[-1] == "block"
    complete(host, guest, image)
    wait_until(lambda: "sevhop" not in host.inhibitors(), PATIENCE, "the inhibitor is gone")


def test_shutdown_is_refused_meanwhile(host: Host, guest: DomainGuest) -> None:
    image = prepare(host, guest)
    for verb in ("poweroff", "reboot", "suspend"):
        done = host.systemctl(verb, "--check-inhibitors=yes")
        assert done.returncode != 0
        assert "sevhop" in done.stderr
    assert host.systemctl("is-system-running").stdout.strip() in ("running", "degraded")
    complete(host, guest, image)


def test_guest_in_the_transit_is_shut_down_with_the_host(host: Host, linux_guest: DomainGuest) -> None:
    """As by its power button, with nothing lost. The next boot does not start it."""
    prepare(host, linux_guest)
    linux_guest.wait_for_ticks()
    host.release.power_off()
    assert "POWER-BUTTON" in linux_guest.file("log").read_text()
    verdict = linux_guest.judge()
    assert verdict.writes
    assert verdict.unharmed, verdict
    host.boot()
    host.wait_until_recovered()
    assert linux_guest.state == "shut off"
    host.virsh("start", linux_guest.name)
    wait_until(lambda: linux_guest.seen().restarts == 1, 2 * PATIENCE, "the guest starts again")


def test_recover_at_boot_settles_what_a_crash_has_left(host: Host, guest: DomainGuest) -> None:
    prepare(host, guest)
    host.release.crash()
    host.boot()
    log = host.log("--unit=sevhop-recover.service")
    assert "web1" in log
    assert "is gone" in log
    assert host.sevhop("recover").stdout == "no interrupted hop was found\n"
    assert guest.state == "shut off"
    host.virsh("start", guest.name)
    wait_until(lambda: guest.seen().restarts == 1 and guest.seen().last > 10, PATIENCE, "the guest counts from 0 again")


def test_recover_is_ordered_before_libvirt_guests(host: Host) -> None:
    assert "libvirt-guests.service" in host.release.show("sevhop-recover.service", "Before").split()
    assert "libvirt-guests.service" in host.release.show("sevhop-upgrade.service", "After").split()
