"""What has a guest outlives the unit that has started it, however that ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.libvirt.holding import Checkpoint
from tests.support.guests.daemon import DomainGuest
from tests.support.guests.running import wait_until

from .conftest import PATIENCE, Host

pytestmark = pytest.mark.long


def prepare(host: Host, guest: DomainGuest) -> Path:
    """Its guest is in the transit, and the unit that has upgraded it is gone. :return: the image."""
    report = host.upgrade(guest.name, "--prepare")
    assert (report["outcome"], report["reason"]) == ("prepared", "")
    return Path(report["image"])


def complete(host: Host, guest: DomainGuest, image: Path) -> None:
    """As any client does."""
    host.virsh("restore", image)
    guest.wait_for_ticks()


def scopes(host: Host) -> dict[str, list[str]]:
    """Names of the processes of each scope of ours."""
    names = {}
    for unit in host.leftover_units():
        names[unit.rsplit("-", 1)[0]] = sorted(
            Path(f"/proc/{pid}/comm").read_text().strip() for pid in host.release.processes_of(unit)
        )
    return names


def test_transit_and_keeper_outlive_the_unit_of_the_command(host: Host, guest: DomainGuest) -> None:
    image = prepare(host, guest)
    guest.wait_for_ticks()
    found = scopes(host)
    assert found.pop("sevhop-transit")[0].startswith("qemu-system")
    (keeper,) = found.values()
    assert {"sevhop-keeper", "sevhop-supervis", "systemd-inhibit"} <= set(keeper)
    complete(host, guest, image)
    assert host.release.unit_of(guest.pid).startswith("machine-qemu")


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
    # The timer does that, without anybody.
    wait_until(lambda: host.left_over() == [], 120, "the hop has been finished")
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
    wait_until(lambda: host.left_over() == [], 120, "the hop has been finished")
    assert guest.state == "running"
    guest.wait_for_ticks()
    assert "web1" in host.log("--unit=sevhop-recover.service")


def test_status_of_a_prepared_domain_is_not_lost(host: Host, guest: DomainGuest) -> None:
    image = prepare(host, guest)
    done = host.sevhop("status", "--json")
    (row,) = json.loads(done.stdout)["domains"]
    assert row["place"] == "transit"
    complete(host, guest, image)
