"""What has a guest outlives the unit that has started it, however that ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.libvirt.holding import Checkpoint
from tests.support.guests.daemon import DomainGuest
from tests.support.guests.running import wait_until

from .conftest import PATIENCE, Host
from .prepared import complete, prepare

pytestmark = pytest.mark.long


def scopes(host: Host) -> dict[str, list[str]]:
    """Names of the processes of each scope of ours."""
    names = {}
    for unit in host.leftover_units():
        names[unit.rsplit("-", 1)[0]] = sorted(
            Path(f"/proc/{pid}/comm").read_text().strip() for pid in host.release.processes_of(unit)
        )
    return names


def test_transit_and_keeper_outlive_the_unit_of_the_command(host: Host, guest: DomainGuest) -> None:
    source = host.release.unit_of(guest.pid)
    image = prepare(host, guest)
    guest.wait_for_ticks()
    found = scopes(host)
    assert {"sevhop-keeper", "sevhop-supervis", "systemd-inhibit"} <= set(found.pop("sevhop-keeper"))
    if source.startswith("machine-qemu"):
        (transit,) = found.pop("sevhop-transit")
        assert transit.startswith("qemu-system")
    # Without controllers libvirt leaves its QEMUs in the cgroup of its own service, which ends none of them.
    assert found == {}
    complete(host, guest, image)


def test_keeper_is_stopped_before_its_transit_and_both_after_libvirts_guests(host: Host, guest: DomainGuest) -> None:
    """When the host shuts down: systemd stops in the reverse order."""
    in_scope = host.release.unit_of(guest.pid).startswith("machine-qemu")
    image = prepare(host, guest)
    transits, (keeper,) = host.units("sevhop-transit-*"), host.units("sevhop-keeper-*")
    assert len(transits) == in_scope
    for unit in (keeper, *transits):
        assert {"virt-guest-shutdown.target", "sevhop-upgrade.service"} <= set(
            host.release.show(unit, "Before").split()
        )
    assert set(transits) <= set(host.release.show(keeper, "After").split())
    complete(host, guest, image)


def test_transit_outlives_the_restart_of_libvirt(host: Host, guest: DomainGuest) -> None:
    image = prepare(host, guest)
    host.must("restart", "libvirtd.service")
    host.wait_until_it_answers()
    guest.wait_for_ticks()
    host.must("stop", "libvirtd.service", "libvirtd.socket", "libvirtd-ro.socket", "libvirtd-admin.socket")
    guest.wait_for_ticks()
    host.must("start", "libvirtd.socket", "libvirtd-ro.socket", "libvirtd-admin.socket", "libvirtd.service")
    host.wait_until_it_answers()
    complete(host, guest, image)


@pytest.mark.parametrize("end", [["stop"], ["restart"], ["kill", "--signal=KILL"]], ids=lambda words: words[0])
def test_guest_runs_when_the_upgrade_service_ends_in_the_restore(
    host: Host, guest: DomainGuest, end: list[str]
) -> None:
    """Its guest is in the transit, and libvirt waits for a hook of somebody else."""
    before = guest.pid
    host.replace_emulator()
    with Checkpoint.at(host, guest, "prepare/begin") as checkpoint:
        host.must("start", "--no-block", "sevhop-upgrade.service")
        checkpoint.wait()
        host.must("--no-block", *end, "sevhop-upgrade.service")
        guest.wait_for_ticks()
        wait_until(
            lambda: (
                end[0] == "restart"
                or host.release.show("sevhop-upgrade.service", "ActiveState") in ("inactive", "failed")
            ),
            PATIENCE,
            "the service has ended",
        )
        guest.wait_for_ticks()
    # The timer does that, without anybody. Its first attempt may have met the hook: the second one comes later.
    host.wait_until_recovered()
    wait_until(lambda: guest.state == "running", PATIENCE, "libvirt has the domain")
    assert guest.pid != before
    guest.wait_for_ticks()


def test_timer_recovers_a_killed_upgrade(host: Host, guest: DomainGuest) -> None:
    host.replace_emulator()
    with Checkpoint.at(host, guest, "stopped/end") as checkpoint:
        host.must("start", "--no-block", "sevhop-upgrade.service")
        checkpoint.wait()
        host.must("kill", "--signal=KILL", "sevhop-upgrade.service")
        guest.wait_for_ticks()
    host.wait_until_recovered()
    assert guest.state == "running"
    guest.wait_for_ticks()
    assert "web1" in host.log("--unit=sevhop-recover.service")


def test_status_of_a_prepared_domain_is_not_lost(host: Host, guest: DomainGuest) -> None:
    image = prepare(host, guest)
    done = host.sevhop("status", "--json")
    (row,) = json.loads(done.stdout)["domains"]
    assert row["place"] == "transit"
    complete(host, guest, image)
