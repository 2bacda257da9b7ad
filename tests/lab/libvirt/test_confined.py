"""
An SEV guest that AppArmor confines, in enforce mode: daemon and guest have libvirt's own profiles. Its network card is
in a bridge, and the kernel moves its packets (vhost-net).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.guests import emulators, real_mode
from tests.support.guests.build import CACHE
from tests.support.guests.daemon import Daemon, Description, DomainGuest

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


def uses_vhost(pid: int) -> bool:
    """Whether a QEMU has the device open."""
    return "/dev/vhost-net" in [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()]


def additions(daemon: Daemon) -> dict[str, Path]:
    """The files for local additions."""
    return {name: daemon.root / "etc/apparmor.d/local" / name for name in ADMINISTRATOR}


def confinement(pid: int) -> str:
    """The label of a process."""
    return Path(f"/proc/{pid}/attr/current").read_text().strip("\n\0")


@pytest.fixture
def daemon(kernel: str) -> Iterator[Daemon]:
    """A daemon, with sevhop's hook and rules. In emulation it takes its time to start and to probe two QEMUs."""
    if kernel != "6.12":
        pytest.skip("libvirt's profiles are the same on every kernel, and once takes minutes")
    daemon = Daemon.start(apparmor=True)
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


@pytest.fixture
def guest(daemon: Daemon) -> Iterator[DomainGuest]:
    """A counting guest."""
    old, firmware = emulators.emulator(emulators.OLD), real_mode.firmware()
    with daemon.bridge() as bridge:
        card = CARD.format(bridge)
        guest = DomainGuest.start(
            daemon, Description("confined", old, "kvm", 32, firmware=firmware, sev=True, interface=card)
        )
        guest.wait_for_ticks()
        yield guest
        guest.end()
    assert contexts() == []
    assert daemon.left_over() == []


def test_confined_guest_hops_only_with_the_installed_rules(daemon: Daemon, guest: DomainGuest) -> None:
    """Without them nothing is touched; `sevhop install` puts them in while the guest runs, and then it hops."""
    new = emulators.emulator(emulators.NEW)
    expected = f"libvirt-{daemon.virsh('domuuid', guest.name)} (enforce)"
    pid = guest.pid
    assert confinement(pid) == expected
    assert uses_vhost(pid)
    assert confinement(int((daemon.root / "run/libvirtd.pid").read_text())) == "libvirtd (enforce)"

    name = "abstractions/libvirt-qemu"
    additions(daemon)[name].write_text(ADMINISTRATOR[name])
    report = daemon.upgrade(guest.name, "--emulator", new)
    assert (report["status"], report["outcome"]) == (1, "refused"), report
    assert report["reason"] == "confinement: AppArmor would keep the new QEMU from the keeper (run: sevhop install)"
    assert guest.pid == pid
    guest.wait_for_ticks()
    assert daemon.left_over() == []

    daemon.install()
    report = daemon.upgrade(guest.name, "--emulator", new, "--timeout", "60")
    assert report["outcome"] == "done", report["reason"]
    assert report["move"]["errno"] == 0
    assert guest.emulator() == str(new)
    assert guest.pid != pid
    assert confinement(guest.pid) == expected
    assert uses_vhost(guest.pid)
    guest.wait_for_ticks()
