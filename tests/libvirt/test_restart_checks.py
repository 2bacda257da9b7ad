"""
What would keep libvirt from starting a domain again, made while its guest runs: the check finds it, and an upgrade is
refused with the guest untouched.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.guests.daemon import Daemon

from .conftest import StartDomain
from .failing import assert_as_before
from .restart_faults import FAULTS, VOLUME


@pytest.mark.virtqemud
@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.usefixtures("surroundings")
def test_upgrade_is_refused_if_libvirt_cannot_start_the_domain_again(
    daemon: Daemon, start: StartDomain, old: Path, new: Path, name: str
) -> None:
    fault = FAULTS[name]
    guest = start(**fault.domain)
    guest.wait_for_ticks()
    found = daemon.sevhop("check", guest.name, "--emulator", new)
    assert found.returncode == 0, found.stdout
    fault.make(daemon, guest)
    pid = guest.pid
    found = daemon.sevhop("check", guest.name, "--emulator", new)
    line = next((line.strip() for line in found.stdout.splitlines() if f"FAIL {fault.test}: " in line), found.stdout)
    assert fault.reason in line
    assert " -> " in line, "a hint"
    assert found.returncode == 1
    report = daemon.upgrade(guest.name, "--emulator", new)
    assert (report["status"], report["outcome"], report["downtime_ms"]) == (1, "refused", None), report
    assert guest.pid == pid
    assert_as_before(daemon, guest, old)


@pytest.mark.virtqemud
@pytest.mark.usefixtures("surroundings")
def test_domain_with_a_volume_hops(daemon: Daemon, start: StartDomain, new: Path) -> None:
    """Its disk has no path in the XML."""
    guest = start(more=VOLUME)
    guest.wait_for_ticks()
    report = daemon.upgrade(guest.name, "--emulator", new)
    assert report["outcome"] == "done", report
    guest.wait_for_ticks()


def test_processor_that_the_new_emulator_lacks_is_refused(
    daemon: Daemon, start: StartDomain, old: Path, new: Path
) -> None:
    """Back to a QEMU that does not know a feature of the processor yet."""
    feature = "<feature policy='require' name='sha-ni'/>"
    cpu = f"<cpu mode='custom' match='exact' check='partial'><model fallback='forbid'>qemu64</model>{feature}</cpu>"
    guest = start(emulator=new, accelerator="tcg", cpu=cpu)
    guest.wait_for_ticks()
    found = daemon.sevhop("check", guest.name, "--emulator", old)
    assert f"FAIL processor: {old}: " in found.stdout
    assert "sha-ni" in found.stdout
    report = daemon.upgrade(guest.name, "--emulator", old)
    assert (report["status"], report["outcome"]) == (1, "refused"), report
    assert_as_before(daemon, guest, new)


def test_processor_of_the_host_passes(daemon: Daemon, start: StartDomain, old: Path, new: Path) -> None:
    """Its XML lists the features that it has. One is left out: nested KVM does not always accept its register."""
    disabled = "<feature policy='disable' name='arch-capabilities'/>"
    guest = start(cpu=f"<cpu mode='host-model'>{disabled}</cpu>")
    guest.wait_for_ticks()
    for emulator in (new, old):
        found = daemon.sevhop("check", guest.name, "--emulator", emulator)
        assert "PASS processor: " in found.stdout, found.stdout


def test_hooks_of_others_are_named(daemon: Daemon, start: StartDomain, new: Path) -> None:
    guest = start()
    guest.wait_for_ticks()
    hook = daemon.root / "etc/libvirt/hooks/qemu.d/other"
    hook.write_text("#!/bin/sh\n")
    hook.chmod(0o755)
    try:
        found = daemon.sevhop("check", guest.name, "--emulator", new)
    finally:
        hook.unlink()
    assert found.returncode == 0
    assert "PASS hooks: libvirt calls others as well: /etc/libvirt/hooks/qemu.d/other" in found.stdout
