"""The units as systemd sees them, and as they do their work."""

from __future__ import annotations

import functools
import json
import re

import pytest
from sevhop.install import units
from sevhop.observe import journald

from tests.support.guests.daemon import DomainGuest
from tests.support.guests.running import wait_until

from .conftest import PATIENCE, Host

pytestmark = pytest.mark.long

#: What systemd-analyze(1) thinks of the exposure of a service, at most. The second one's limits would be its guests'.
_EXPOSURE = {"sevhop-recover.service": 2.7, "sevhop-upgrade.service": 8.5}


def test_systemd_has_nothing_to_say_about_the_units(host: Host) -> None:
    paths = [f"/usr/lib/systemd/system/{name}" for name in units.NAMES]
    done = host.release.entered("systemd-analyze", "verify", "--man=no", *paths)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("unit", _EXPOSURE)
def test_exposure_does_not_grow(host: Host, unit: str) -> None:
    text = host.release.entered("systemd-analyze", "security", "--no-pager", unit).stdout
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", text)
    assert found is not None
    assert float(found[1]) <= _EXPOSURE[unit], text


def test_package_starts_the_recover_path_alone(host: Host) -> None:
    assert host.systemctl("is-active", units.RECOVER[-1]).stdout == "active\n"
    for unit in (units.DELAY, *units.UPGRADE):
        assert host.systemctl("is-active", unit).stdout == "inactive\n"
    assert host.systemctl("is-enabled", "sevhop-upgrade.path").stdout == "disabled\n"


def test_service_upgrades_an_outdated_domain_and_journald_has_it(host: Host, guest: DomainGuest) -> None:
    before = guest.pid
    host.replace_emulator()
    host.must("start", "sevhop-upgrade.service")
    assert guest.pid != before
    guest.wait_for_ticks()
    found = host.log("--output=json", f"MESSAGE_ID={journald.OUTCOME}", "SEVHOP_GUEST=web1", "--lines=1")
    record = json.loads(found.splitlines()[-1])
    assert record["SEVHOP_OUTCOME"] == "done"
    assert float(record["SEVHOP_MS"]) > 0
    assert (record["PRIORITY"], record["SYSLOG_IDENTIFIER"]) == ("5", "sevhop")
    assert record["_SYSTEMD_UNIT"] == "sevhop-upgrade.service"
    assert host.log(f"MESSAGE_ID={journald.PHASE}", "SEVHOP_GUEST=web1", "SEVHOP_PHASE=restore")


def test_path_unit_upgrades_each_time_the_emulator_is_replaced(host: Host, guest: DomainGuest) -> None:
    host.must("enable", "--now", "sevhop-upgrade.path")
    for _ in range(2):
        upgraded = functools.partial(_upgraded, host, guest, guest.pid)
        host.replace_emulator()
        wait_until(upgraded, PATIENCE, "the path unit has the domain upgraded")
        guest.wait_for_ticks()
    host.must("disable", "--now", "sevhop-upgrade.path")


def _upgraded(host: Host, guest: DomainGuest, before: int) -> bool:
    """Also the service is over, and the timer is armed no more."""
    path = guest.daemon.root / f"run/libvirt/qemu/{guest.name}.pid"
    if not path.exists() or int(path.read_text() or 0) == before:
        return False
    states = [host.release.show(unit, "ActiveState") for unit in ("sevhop-upgrade.service", "sevhop-upgrade.timer")]
    return states == ["inactive", "inactive"]


def test_service_fails_if_a_domain_cannot_hop(host: Host, guest: DomainGuest) -> None:
    hook = host.root / "etc/libvirt/hooks/qemu.d/sevhop"
    text = hook.read_text()
    before = guest.pid
    host.replace_emulator()
    try:
        hook.unlink()
        assert host.systemctl("start", "sevhop-upgrade.service").returncode != 0
    finally:
        hook.write_text(text)
        hook.chmod(0o755)
    assert host.release.show("sevhop-upgrade.service", "Result") == "exit-code"
    assert "web1" in host.log("--unit=sevhop-upgrade.service")
    assert guest.pid == before
