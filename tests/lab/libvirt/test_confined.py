"""
Guests that AppArmor confines, in enforce mode: daemon and guest have libvirt's own profiles. Their card is in a bridge,
and the kernel moves its packets (vhost-net). One has an SEV context; the other goes by way of a transit.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.guests import apparmor, emulators, real_mode
from tests.support.guests.build import CACHE
from tests.support.guests.daemon import Daemon, Description, DomainGuest
from tests.support.guests.running import wait_until

from ..contract.sev import contexts

_FETCHED = CACHE / "qemu"
_EMULATORS = _FETCHED / "*" / "usr" / "bin" / "qemu-system-x86_64"
#: libvirt's files for local additions, and what an administrator has to write into them: QEMU is at a place that
#: libvirt's profiles do not know, and libvirt 9 does not let a guest with AppArmor use /dev/sev.
ADMINISTRATOR = {
    "usr.sbin.libvirtd": f"  {_EMULATORS} PUx,\n",
    "abstractions/libvirt-qemu": f"  {_EMULATORS} rmix,\n  {_FETCHED}/** rm,\n  /dev/sev rw,",
}


#: libvirt refuses to start it where there is no vhost-net.
CARD = "<interface type='bridge'><source bridge='{}'/><model type='virtio'/><driver name='vhost'/></interface>"
#: The processor of the lab, for a guest that is not encrypted.
CPU = "<cpu mode='custom' match='exact' check='none'><model fallback='allow'>EPYC</model></cpu>"
#: libvirt's profiles are the same on every kernel.
pytestmark = pytest.mark.one_kernel("6.12")

_DENIED = re.compile(r'apparmor="DENIED" operation="(?P<operation>[^"]*)" .*profile="(?P<profile>[^"]*)"(?P<rest>.*)')
_WHO = re.compile(r" (pid|comm|fsuid|ouid)=\S+")


def uses_vhost(pid: int) -> bool:
    """Whether a QEMU has the device open."""
    return "/dev/vhost-net" in [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()]


def additions(daemon: Daemon) -> dict[str, Path]:
    """The files for local additions."""
    return {name: daemon.root / "etc/apparmor.d/local" / name for name in ADMINISTRATOR}


def denials(daemon: Daemon, label: str) -> set[str]:
    """What the kernel has denied to the processes with a label."""
    found = filter(None, map(_DENIED.search, daemon.run("dmesg").stdout.splitlines()))
    name = label.partition(" ")[0]
    return {f"{one['operation']}{_WHO.sub('', one['rest'])}" for one in found if one["profile"] == name}


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """A daemon, with sevhop's hook and rules. In emulation it takes its time to start and to probe two QEMUs."""
    daemon = Daemon.start(security="apparmor")
    try:
        for name, path in additions(daemon).items():
            path.write_text(ADMINISTRATOR[name])
        daemon.install()
        yield daemon
        done = daemon.sevhop("uninstall")
        assert done.returncode == 0, done.stderr
        assert {name: path.read_text() for name, path in additions(daemon).items()} == ADMINISTRATOR
    finally:
        daemon.stop()


@contextmanager
def counting(daemon: Daemon, name: str, **fields: Any) -> Iterator[DomainGuest]:
    """A counting guest, until the end of the context. :param fields: of its description."""
    old, firmware = emulators.emulator(emulators.OLD), real_mode.firmware()
    with daemon.bridge() as bridge:
        description = Description(name, old, "kvm", 32, firmware=firmware, interface=CARD.format(bridge), **fields)
        guest = DomainGuest.start(daemon, description)
        guest.wait_for_ticks()
        yield guest
        guest.end()
    assert contexts() == []
    assert daemon.left_over() == []


@pytest.fixture
def guest(daemon: Daemon) -> Iterator[DomainGuest]:
    """One with an SEV context."""
    with counting(daemon, "confined", sev=True) as guest:
        yield guest


@pytest.mark.faults
def test_confined_guest_hops_only_with_the_installed_rules(daemon: Daemon, guest: DomainGuest) -> None:
    """Without them nothing is touched; `sevhop install` puts them in while the guest runs, and then it hops."""
    new = emulators.emulator(emulators.NEW)
    expected = apparmor.label(apparmor.profile_of(guest))
    pid = guest.pid
    assert apparmor.confinement(pid) == expected
    assert uses_vhost(pid)
    assert apparmor.confinement(int((daemon.root / "run/libvirtd.pid").read_text())) == "libvirtd (enforce)"

    name = "abstractions/libvirt-qemu"
    additions(daemon)[name].write_text(ADMINISTRATOR[name])
    report = daemon.upgrade(guest.name, "--emulator", new)
    assert (report["status"], report["outcome"]) == (1, "refused"), report
    assert report["reason"] == "confinement: AppArmor would keep the new QEMU from the keeper (run: sevhop install)"
    assert guest.pid == pid
    guest.wait_for_ticks()
    assert daemon.left_over() == []

    daemon.install()
    report = daemon.upgrade(guest.name, "--emulator", new, "--timeout", "300")
    assert report["outcome"] == "done", report["reason"]
    assert report["move"]["errno"] == 0
    assert guest.emulator() == str(new)
    assert guest.pid != pid
    assert apparmor.confinement(guest.pid) == expected
    assert uses_vhost(guest.pid)
    guest.wait_for_ticks()


@pytest.fixture
def shared(daemon: Daemon) -> Iterator[DomainGuest]:
    """One that a transit can carry."""
    with counting(daemon, "shared", cpu=CPU) as guest:
        yield guest


def test_transit_is_confined_by_a_copy_of_the_domains_profile(daemon: Daemon, shared: DomainGuest) -> None:
    """The domain's own is unloaded by libvirt meanwhile. The copy is gone when the guest is libvirt's again."""
    new, old_pid = emulators.emulator(emulators.NEW), shared.pid
    profile = apparmor.profile_of(shared)
    expected = apparmor.label(profile)
    assert apparmor.confinement(old_pid) == expected
    assert uses_vhost(old_pid)

    report = daemon.upgrade(shared.name, "--emulator", new, "--timeout", "300", "--prepare")
    assert (report["outcome"], report["in_transit"], report["notes"]) == ("prepared", True, []), report
    assert shared.state == "shut off"
    (label,) = apparmor.copies(profile)
    assert label.endswith(" (enforce)")
    assert expected not in apparmor.LOADED.read_text().splitlines()
    (transit,) = apparmor.confined_by(label)
    assert os.readlink(f"/proc/{transit}/exe") == str(new.resolve())
    assert not uses_vhost(transit)
    shared.wait_for_ticks()

    daemon.virsh("restore", report["image"])
    wait_until(lambda: shared.state == "running" and not apparmor.copies(profile), 120, "the copy is removed")
    assert shared.emulator() == str(new)
    assert apparmor.confinement(shared.pid) == expected
    assert uses_vhost(shared.pid)
    shared.wait_for_ticks()
    done = daemon.recover_one()
    assert (done["status"], done["result"], done["detail"]) == (0, "destination", ""), done
    assert denials(daemon, label) <= denials(daemon, expected)


@pytest.mark.faults
def test_copy_of_the_profile_is_removed_if_the_guest_stays(daemon: Daemon, shared: DomainGuest) -> None:
    """By an upgrade that is interrupted, and by `sevhop recover` after one that was killed."""
    new, pid = emulators.emulator(emulators.NEW), shared.pid
    profile = apparmor.profile_of(shared)
    for number, status in ((signal.SIGINT, 3), (signal.SIGKILL, -signal.SIGKILL)):
        command = daemon.start_command(
            *(sys.executable, "-m", "sevhop.cli", "--verbose", "upgrade", shared.name, "--emulator", new)
        )
        assert command.stderr is not None
        assert any(line.strip().endswith(": prepare") for line in command.stderr)
        assert len(apparmor.copies(profile)) == 1
        command.send_signal(number)
        command.communicate(timeout=300)
        assert command.returncode == status
        if number == signal.SIGKILL:
            done = daemon.sevhop("recover", "--timeout", "300")
            assert done.returncode == 0, done.stderr
        assert apparmor.copies(profile) == []
        assert shared.pid == pid
        shared.wait_for_ticks()
