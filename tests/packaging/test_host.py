"""The package on a host: from its installation to a domain that has hopped, and gone without a trace."""

from __future__ import annotations

from pathlib import Path

from sevhop.install import units

from tests.support.guests.daemon import Daemon, DomainGuest
from tests.support.guests.release import Release

from .conftest import NAME, PACKAGE, left

_HOOK = Path("/etc/libvirt/hooks/qemu.d/sevhop")


def test_command_runs_after_installation(host: Release) -> None:
    assert host.must("sevhop", "--version").startswith("sevhop ")
    assert "usage: sevhop" in host.must("sevhop", "--help")
    assert host.must("sevhop", "recover") == "no interrupted hop was found\n"


def test_recover_units_alone_are_enabled(host: Release) -> None:
    links = host.must("find", "/etc/systemd/system", "-name", "sevhop*", "-printf", "%f\\n").splitlines()
    assert sorted(links) == sorted(units.RECOVER)


def test_command_loads_no_planted_modules(host: Release) -> None:
    """Root may be anywhere when it calls the command."""
    planted = host.root / "tmp/planted"
    planted.mkdir()
    (planted / "asyncio.py").write_text("raise SystemExit('planted')\n")
    host.must("env", "--chdir=/tmp/planted", "PYTHONPATH=/tmp/planted", "sevhop", "--version")


def test_domain_hops_with_installed_package(daemon: Daemon, guest: DomainGuest) -> None:
    guest.wait_for_ticks()
    before = guest.pid
    checked = daemon.sevhop("check", NAME)
    assert checked.returncode == 0, checked.stdout
    report = daemon.upgrade(NAME)
    assert (report["outcome"], report["reason"]) == ("done", "")
    assert guest.pid != before
    guest.wait_for_ticks()
    assert NAME in daemon.sevhop("status").stdout


def test_package_cannot_be_purged_during_a_hop(daemon: Daemon, guest: DomainGuest) -> None:
    guest.wait_for_ticks()
    report = daemon.upgrade(NAME, "--prepare")
    assert (report["outcome"], report["reason"]) == ("prepared", "")
    done = daemon.run("apt-get", "--yes", "purge", "sevhop")
    assert done.returncode != 0
    assert f"sevhop: cannot uninstall: hops are in progress: {NAME} (see sevhop status)\n" in done.stdout + done.stderr
    assert daemon.run("dpkg-query", "--show", "--showformat=${db:Status-Abbrev}", "sevhop").stdout == "ii "
    assert daemon.sevhop("recover").returncode == 0
    daemon.virsh("restore", report["image"])
    guest.wait_for_ticks()
    assert daemon.sevhop("recover").returncode == 0


def test_package_upgrade_renews_the_hook(daemon: Daemon) -> None:
    hook = daemon.root / _HOOK.relative_to("/")
    now = hook.read_text()
    hook.write_text("#!/bin/sh\nexec /usr/lib/sevhop/older\n")
    done = daemon.run("apt-get", "--yes", "--reinstall", "install", PACKAGE)
    assert done.returncode == 0, done.stderr
    assert hook.read_text() == now


def test_purge_leaves_no_trace(host: Release) -> None:
    # There is no daemon in sight, so the hook is put in place and not seen to work.
    assert host.run("sevhop", "install").returncode == 1
    assert str(_HOOK) in left(host)
    journal = host.root / "var/lib/sevhop/journal/1.journal"
    journal.parent.mkdir(parents=True)
    journal.touch()
    done = host.run("apt-get", "--yes", "purge", "sevhop")
    assert done.returncode != 0
    assert "/1.journal (see sevhop status, or run: sevhop recover)\n" in done.stdout + done.stderr
    journal.unlink()
    host.must("apt-get", "--yes", "purge", "sevhop")
    assert left(host) == []
    host.install(PACKAGE)
