"""A domain with ``<launchSecurity type='sev'>`` hops under a real libvirt daemon, and the kernel moves its context."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.guests import emulators, real_mode
from tests.support.guests.daemon import Daemon, Description, DomainGuest
from tests.support.guests.running import wait_until

from ...libvirt import dying
from ...libvirt.failing import other_hook_refuses
from ..contract.sev import contexts

#: libvirt makes no difference between kernels.
pytestmark = pytest.mark.one_kernel("6.1")

#: Seconds for a step, since everything is slow in the lab; and the way of these tests. The other one is in
#: test_sev_transit.py.
WITHOUT = ("--timeout", "300", "--no-transit")


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """A daemon, with sevhop's hook. Starting it and having it probe two QEMUs takes minutes in emulation."""
    with Daemon.installed() as daemon:
        yield daemon


@pytest.fixture
def guest(daemon: Daemon) -> Iterator[DomainGuest]:
    """A counting SEV guest."""
    firmware = real_mode.firmware()
    guest = DomainGuest.start(
        daemon, Description("sev", emulators.emulator(emulators.OLD), "kvm", 32, firmware=firmware, sev=True)
    )
    guest.wait_for_ticks()
    yield guest
    guest.end()
    assert contexts() == []
    assert daemon.left_over() == []


def arrived(daemon: Daemon, guest: DomainGuest, emulator: Path) -> None:
    """The guest runs in this emulator, and libvirt and QEMU report that it is an SEV guest."""
    assert guest.emulator() == guest.emulator("--inactive") == str(emulator)
    guest.wait_for_ticks()
    assert "<launchSecurity type='sev'>" in guest.xml()
    assert "sev-measurement" in daemon.virsh("domlaunchsecinfo", guest.name)
    sev = guest.monitor("query-sev")["return"]
    (context,) = contexts()
    assert (sev["enabled"], sev["state"], sev["handle"]) == (True, "running", context.handle)
    status = guest.monitor("x-sev-adopt-status")["return"]
    assert (status["context"], status["moved"], status["ram"]) == ("sev", True, "shared")


@pytest.mark.faults
def test_sev_domain_changes_its_qemu(daemon: Daemon, guest: DomainGuest) -> None:
    old, new = emulators.emulator(emulators.OLD), emulators.emulator(emulators.NEW)
    assert "Migration is not implemented" in daemon.run("virsh", "save", guest.name, "/run/image").stderr
    for emulator in (new, old):
        report = daemon.upgrade(guest.name, "--emulator", emulator, *WITHOUT)
        assert report["outcome"] == "done", report["reason"]
        assert report["context"] == "sev"
        assert report["move"]["errno"] == 0
        arrived(daemon, guest, emulator)

    # Its encrypted firmware is private to its first QEMU: what would be a reboot is a cold start.
    (before,) = contexts()
    daemon.run("virsh", "reset", guest.name)
    wait_until(lambda: guest.seen().restarts == 1, 120, "the domain is started again")
    (context,) = contexts()
    assert context != before
    assert "x-sev-adopt-status" not in [row["name"] for row in guest.monitor("query-commands")["return"]]


@pytest.mark.faults
def test_upgrade_is_rolled_back_if_other_hook_refuses_after_move(daemon: Daemon, guest: DomainGuest) -> None:
    """The context is in the destination already, and is restored from there."""
    old, new = emulators.emulator(emulators.OLD), emulators.emulator(emulators.NEW)
    with other_hook_refuses(daemon):
        report = daemon.upgrade(guest.name, "--emulator", new, *WITHOUT)
    assert (report["status"], report["outcome"]) == (3, "rolled-back"), report["reason"]
    arrived(daemon, guest, old)


@pytest.mark.faults
def test_upgrade_is_rolled_back_if_keeper_dies_around_the_move(
    daemon: Daemon, guest: DomainGuest, tmp_path: Path
) -> None:
    """The context is in the destination's VM by then, the destination exits, and only the supervisor has that VM."""
    old, new = emulators.emulator(emulators.OLD), emulators.emulator(emulators.NEW)
    arguments = ["upgrade", "--json", guest.name, "--emulator", str(new), *WITHOUT]
    environment = dying.after_call(tmp_path, "sevhop_qmp.move", "move")
    done = daemon.run("env", environment, sys.executable, "-m", "sevhop.cli", *arguments)
    report = json.loads(done.stdout)["domains"][0]
    assert report["outcome"] == "rolled-back", report
    states = daemon.root / str(dying.STATES).lstrip("/")
    states.unlink()
    arrived(daemon, guest, old)

    # The keeper dies after the commit, and the destination with it.
    other = daemon.root / "etc/libvirt/hooks/qemu.d/zz-dying"
    once = f'[ "$2/$3" = started/begin ] && [ ! -e {dying.STATES} ] || exit 0'
    program = shlex.join([sys.executable, dying.__file__, "sevhop-keeper"])
    other.write_text(f"#!/bin/sh\n{once}\n{program} >/dev/null\nexit 1\n")
    other.chmod(0o755)
    report = daemon.upgrade(*arguments[2:])
    assert report["outcome"] == "rolled-back", report
    assert states.read_text() == "committed"
    arrived(daemon, guest, old)
    other.unlink()
    report = daemon.upgrade(*arguments[2:])
    assert report["outcome"] == "done", report
    arrived(daemon, guest, new)
