"""
A domain with an SEV context that SELinux confines, in enforcing mode: Debian's policy, the daemon and its QEMUs with
the labels that they have on an installed system. sevhop runs as from the shell of an unconfined user.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.guests import emulators, real_mode
from tests.support.guests.daemon import Daemon, Description, DomainGuest, process_file

from ..contract.sev import contexts

pytestmark = pytest.mark.long

_DENIED = re.compile(r"avc: +denied .*permissive=0.*")
_NUMBERS = re.compile(r"(pid|ino|ioctlcmd|name|path|dev)=\S+ ?")
PATIENCE = ("--timeout", "300")


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """A daemon, without sevhop's hook and module."""
    daemon = Daemon.start(security="selinux")
    try:
        yield daemon
    finally:
        daemon.stop()


@pytest.fixture
def guest(daemon: Daemon) -> Iterator[DomainGuest]:
    """A counting guest with an SEV context."""
    old, firmware = emulators.emulator(emulators.OLD), real_mode.firmware()
    guest = DomainGuest.start(daemon, Description("labelled", old, "kvm", 32, firmware=firmware, sev=True))
    guest.wait_for_ticks()
    yield guest
    guest.end()
    assert contexts() == []
    assert daemon.left_over() == []


def label(pid: int) -> str:
    """Of a process."""
    return process_file(pid, "attr/current").decode().strip("\n\0")


def denials(daemon: Daemon) -> set[str]:
    """What the kernel has denied so far."""
    return {_NUMBERS.sub("", one) for one in _DENIED.findall(daemon.run("dmesg").stdout)}


def test_sev_guest_hops_to_and_fro_only_with_the_module(daemon: Daemon, guest: DomainGuest) -> None:
    """`sevhop install` loads it while the guest runs."""
    assert Path("/sys/fs/selinux/enforce").read_text() == "1"
    before = label(guest.pid)
    assert before.startswith("system_u:system_r:svirt_t:s0:c")
    done = daemon.sevhop("check", guest.name)
    assert done.returncode == 1
    assert "the policy module sevhop is not loaded" in done.stdout

    usual = denials(daemon)
    daemon.virsh("suspend", guest.name)  # the tools of the policy take ten times as long beside a guest
    daemon.install()
    daemon.virsh("resume", guest.name)
    pid = guest.pid
    for emulator in (emulators.emulator(emulators.NEW), emulators.emulator(emulators.OLD)):
        report = daemon.upgrade(guest.name, "--emulator", emulator, *PATIENCE)
        assert (report["outcome"], report["notes"]) == ("done", []), report
        assert len(report["downtimes_ms"]) == 2
        assert guest.emulator() == str(emulator)
        assert guest.pid != pid
        assert label(guest.pid) == before
        guest.wait_for_ticks()
        pid = guest.pid
    assert denials(daemon) <= usual

    daemon.virsh("suspend", guest.name)
    done = daemon.sevhop("uninstall")
    assert done.returncode == 0, done.stderr
    assert "the policy module sevhop is not loaded" in daemon.sevhop("check", guest.name).stdout
