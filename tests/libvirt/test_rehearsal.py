"""The rehearsal: what it finds, and that the guest does not notice it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.guests import emulators
from tests.support.guests.daemon import Daemon, DomainGuest
from tests.support.guests.enclosure import GUESTS
from tests.support.guests.running import wait_until

from ..conftest import some_of
from .conftest import StartDomain
from .failing import CANNOT_LOAD, DYING, assert_as_before, wrapper

#: A second disk that may only be read, a drive without a medium, a channel that is connected, a screen, a tap ...
DEVICES = f"""
    <disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{GUESTS}/second.raw'/>
      <target dev='vdb' bus='virtio'/><readonly/></disk>
    <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{GUESTS}/third.qcow2'/>
      <target dev='sda' bus='scsi'/></disk>
    <disk type='file' device='cdrom'><target dev='sdb' bus='sata'/><readonly/></disk>
    <controller type='scsi' model='virtio-scsi'/>
    <channel type='unix'><source mode='bind' path='{GUESTS}/channel'/>
      <target type='virtio' name='org.example.channel'/></channel>
    <graphics type='vnc' socket='{GUESTS}/vnc'/>
    <video><model type='vga'/></video>
    <input type='tablet' bus='usb'/>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
    <interface type='ethernet'><target dev='sevhop-test' managed='yes'/><model type='virtio'/></interface>
    <interface type='ethernet'><model type='virtio'/><driver queues='2'/></interface>
"""


def inside(daemon: Daemon, path: Path) -> Path:
    """A path in the daemon's file system."""
    return daemon.root / str(path).lstrip("/")


def files(daemon: Daemon) -> dict[str, tuple[int, int, str]]:
    """The guests' files: inode, time of the last change, content. A log grows."""
    found = {}
    for path in sorted(inside(daemon, GUESTS).iterdir()):
        stat = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        if path.suffix != ".log":
            found[path.name] = (stat.st_ino, stat.st_mtime_ns, content)
    return found


def connected(daemon: Daemon, path: Path) -> socket.socket:
    """A client of one of the guest's sockets."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(30)
    client.connect(str(inside(daemon, path)))
    return client


def locked(pid: int) -> set[str]:
    """Names of the files that a QEMU has locked."""
    rows = Path(f"/proc/{pid}/fdinfo").iterdir()
    return {os.readlink(f"/proc/{pid}/fd/{row.name}").rsplit("/")[-1] for row in rows if "OFDLCK" in row.read_text()}


def rehearsing(guest: DomainGuest) -> list[int]:
    """The rehearsal QEMUs of a guest."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
            if f"guest={guest.name},".encode() in words and b"null-co" in words:
                found.append(int(entry.name))
    return found


def traced(daemon: Daemon, guest: DomainGuest, fault: str, *words: str | Path) -> tuple[int, dict[str, Any]]:
    """
    Upgrade, and have something happen during the downtime of the rehearsal.

    :param fault: statements; ``qemu`` is the pid of the rehearsal QEMU, ``name`` the domain's name.
    """
    script = f"""
import os, signal, subprocess, sys
from pathlib import Path
from sevhop.cli.main import main
from sevhop.install import verification
from sevhop_qmp import device_state

write = device_state.IncomingState.write

async def then(self, data):
    name = {guest.name!r}
    children = Path(f"/proc/self/task/{{os.getpid()}}/children").read_text().split()
    [qemu] = [int(pid) for pid in children if b"-incoming" in Path("/proc", pid, "cmdline").read_bytes()]
    {fault}
    await write(self, data)

device_state.IncomingState.write = then
sys.exit(main(sys.argv[1:]))
"""
    done = daemon.run(sys.executable, "-c", script, "upgrade", "--no-transit", guest.name, "--json", *words)
    report = json.loads(done.stdout)["domains"][0] if done.stdout else {}
    return done.returncode, report


REFUSED = {
    "cannot load": (CANNOT_LOAD, "Unknown savevm section type"),
    "dies at once": (DYING["dies at once"], "no, thanks"),
    "is killed": (DYING["is killed"], "cannot start this domain"),
    "hangs": ('case "$*" in *-incoming*) exec sleep 300;; esac', "no QMP greeting"),
    "starts without the library": (DYING["starts without the library"], "x-sev-adopt-status"),
    "starts without the keeper": (DYING["starts without the keeper"], "has not adopted the guest's memory"),
}


@pytest.mark.parametrize("how", some_of(REFUSED, 5))
def test_upgrade_is_refused_if_rehearsal_fails(
    daemon: Daemon, start: StartDomain, old: Path, new: Path, how: str
) -> None:
    text, reason = REFUSED[how]
    guest = start()
    guest.wait_for_ticks()
    pid = guest.pid
    emulator = wrapper(daemon, how.replace(" ", "-"), new, text)
    before = files(daemon)
    report = daemon.upgrade(guest.name, "--no-transit", "--emulator", emulator)
    assert (report["status"], report["outcome"]) == (1, "refused"), report
    assert reason in report["reason"]
    assert [phase["name"] for phase in report["phases"]][-1] == "rehearse"
    assert (report["rehearsal_ms"] is not None) == (how == "cannot load")
    assert files(daemon) == before
    assert guest.pid == pid
    assert f"{guest.name}.qcow2" in locked(pid)
    assert_as_before(daemon, guest, old)


def test_rehearsal_refuses_newest_qemu_if_it_cannot_load(
    daemon: Daemon, start: StartDomain, new: Path, newest: Path
) -> None:
    """QEMU 11.1 cannot load virtio devices of 10.0. Others may, and then do; never is it found out too late."""
    guest = start(emulator=new)
    guest.wait_for_ticks()
    pid = guest.pid
    report = daemon.upgrade(guest.name, "--no-transit", "--emulator", newest)
    if emulators.version(newest).startswith("11.1."):
        assert report["outcome"] == "refused"
        assert "vring.num" in report["reason"]
    if report["outcome"] == "refused":
        assert guest.pid == pid
        assert rehearsing(guest) == []
        assert_as_before(daemon, guest, new)
    else:
        assert report["outcome"] == "done", report
        guest.wait_for_ticks()


def test_rehearsal_disturbs_nothing_of_the_domain(daemon: Daemon, start: StartDomain, old: Path, new: Path) -> None:
    if not Path("/dev/net/tun").exists():
        pytest.skip("no tap devices here")
    assert daemon.run("qemu-img", "create", "-q", "-f", "raw", GUESTS / "second.raw", "4M").returncode == 0
    assert daemon.run("qemu-img", "create", "-q", "-f", "qcow2", GUESTS / "third.qcow2", "64M").returncode == 0
    guest = start(pflash=True, more=DEVICES)
    guest.wait_for_ticks()
    pid = guest.pid
    cards = set(os.listdir(daemon.root / "sys/class/net"))
    assert "sevhop-test" in cards
    locks = locked(pid)
    assert {f"{guest.name}.qcow2", f"{guest.name}.fd", "third.qcow2", "second.raw"} <= locks
    emulator = wrapper(daemon, "cannot-load", new, CANNOT_LOAD)
    before = files(daemon)
    with connected(daemon, GUESTS / "channel") as channel, connected(daemon, GUESTS / "vnc") as vnc:
        assert vnc.recv(4) == b"RFB "
        report = daemon.upgrade(guest.name, "--no-transit", "--emulator", emulator)
        assert (report["status"], report["outcome"]) == (1, "refused"), report
        assert report["notes"] == []
        assert set(os.listdir(daemon.root / "sys/class/net")) == cards
        assert files(daemon) == before
        assert locked(pid) == locks
        channel.setblocking(False)
        with pytest.raises(BlockingIOError):
            channel.recv(1)  # still connected, and silent
        assert vnc.recv(8) == b"003.008\n"
        vnc.send(b"RFB 003.008\n")
        assert vnc.recv(1) == b"\1"  # served by the source
    assert guest.pid == pid
    assert rehearsing(guest) == []
    assert_as_before(daemon, guest, old)

    report = daemon.upgrade(guest.name, "--no-transit", "--emulator", new)
    assert report["outcome"] == "done", report
    assert report["notes"] == []
    assert report["rehearsal_ms"] > 0
    guest.wait_for_ticks()


def test_rehearsal_succeeds_without_kvm(daemon: Daemon, start: StartDomain, new: Path) -> None:
    guest = start(accelerator="tcg")
    guest.wait_for_ticks()
    report = daemon.upgrade(guest.name, "--no-transit", "--emulator", new)
    assert report["outcome"] == "done", report
    assert (report["notes"], report["rehearsal_ms"] > 0) == ([], True)
    guest.wait_for_ticks()


FAULTS = {
    "hangs": ("os.kill(qemu, signal.SIGSTOP)", (1, "refused"), "has not loaded the device state"),
    "dies": ("os.kill(qemu, signal.SIGKILL)", (1, "refused"), "cannot take this guest over"),
    "interrupted": ("os.kill(os.getpid(), signal.SIGINT)", (3, "rolled-back"), "interrupted"),
    "resumed": ("subprocess.run(['virsh', '-q', 'resume', name])", (1, "refused"), "another client resumed"),
    "libvirt dies": (
        "os.kill(next(iter(verification.daemons().values())), signal.SIGKILL)",
        (3, "rolled-back"),
        "rehearse: libvirt cannot send ",
    ),
    "a bug": ("raise ValueError('wrong')", (3, "rolled-back"), "unexpected ValueError"),
}


@pytest.mark.parametrize("what", some_of(FAULTS, 3))
def test_guest_survives_fault_during_rehearsal_downtime(
    daemon: Daemon, start: StartDomain, old: Path, new: Path, what: str
) -> None:
    guest = start()
    guest.wait_for_ticks()
    pid = guest.pid
    fault, outcome, reason = FAULTS[what]
    status, report = traced(daemon, guest, fault, "--emulator", new)
    assert (status, report["outcome"]) == outcome, report
    assert reason in report["reason"]
    assert guest.pid == pid
    # It is a grandchild, which ends with its parent.
    wait_until(lambda: rehearsing(guest) == [], 10, "the QEMU of the rehearsal has exited")
    assert_as_before(daemon, guest, old)
    assert daemon.upgrade(guest.name, "--no-transit", "--emulator", new)["outcome"] == "done"
    guest.wait_for_ticks()


def test_disks_stay_locked_during_the_downtime(daemon: Daemon, start: StartDomain, new: Path) -> None:
    guest = start()
    guest.wait_for_ticks()
    rows = f"[row.read_text() for row in Path('/proc/{guest.pid}/fdinfo').iterdir()]"
    count = f"Path('/run/locks').write_text(str(''.join({rows}).count('OFDLCK')))"
    before = "".join(row.read_text() for row in Path(f"/proc/{guest.pid}/fdinfo").iterdir()).count("OFDLCK")
    _, report = traced(daemon, guest, count, "--emulator", wrapper(daemon, "cannot-load", new, CANNOT_LOAD))
    assert report["outcome"] == "refused", report
    assert int((daemon.root / "run/locks").read_text()) == before > 0


def test_recover_resumes_guest_after_command_killed_in_rehearsal(
    daemon: Daemon, start: StartDomain, old: Path, new: Path
) -> None:
    """Then nobody resumes the guest until ``recover`` does; but the rehearsal QEMU is killed with the command."""
    guest = start()
    guest.wait_for_ticks()
    traced(daemon, guest, "os.kill(os.getpid(), signal.SIGKILL)", "--emulator", new)
    assert guest.state == "paused"
    wait_until(lambda: not rehearsing(guest), 15, "the rehearsal QEMU exits")
    done = daemon.sevhop("recover")
    assert done.returncode == 0, done
    wait_until(lambda: daemon.left_over() == [], 15, "the keeper exits")
    assert_as_before(daemon, guest, old)


def test_paused_guest_stays_paused(daemon: Daemon, start: StartDomain, old: Path, new: Path) -> None:
    guest = start()
    guest.wait_for_ticks()
    daemon.virsh("suspend", guest.name)
    report = daemon.upgrade(guest.name, "--no-transit", "--emulator", wrapper(daemon, "cannot-load", new, CANNOT_LOAD))
    assert (report["status"], report["outcome"], report["rehearsal_ms"]) == (1, "refused", None)
    assert guest.state == "paused"
    daemon.virsh("resume", guest.name)
    assert_as_before(daemon, guest, old)


def test_rehearsal_of_other_machine_is_refused(daemon: Daemon, start: StartDomain, old: Path, new: Path) -> None:
    guest = start()
    guest.wait_for_ticks()
    pid = guest.pid
    another = 'case "$*" in *-incoming*) set -- "$@" -device virtio-rng-pci,id=another,addr=1d;; esac'
    report = daemon.upgrade(guest.name, "--no-transit", "--emulator", wrapper(daemon, "another", new, another))
    assert (report["status"], report["outcome"]) == (1, "refused"), report
    assert "device another is not in the old QEMU" in report["reason"]
    assert "--no-rehearsal" not in report["reason"]
    assert guest.pid == pid
    assert_as_before(daemon, guest, old)


def test_no_rehearsal_is_suggested_only_if_nothing_else_fails(
    daemon: Daemon, start: StartDomain, old: Path, new: Path
) -> None:
    guest = start()
    guest.wait_for_ticks()
    done = daemon.sevhop(
        "upgrade", "--no-transit", guest.name, "--emulator", str(wrapper(daemon, "dies", new, DYING["dies at once"]))
    )
    assert done.returncode == 1
    assert "cannot start this domain" in done.stderr
    assert "--no-rehearsal" not in done.stderr
    tools = Path("/run/tools")
    assert daemon.run("sh", "-c", f"mkdir {tools} && ln -s /usr/bin/* {tools} && rm {tools}/setpriv").returncode == 0
    command = [sys.executable, "-m", "sevhop.cli", "upgrade", "--no-transit", guest.name, "--emulator", str(new)]
    done = daemon.run("env", f"PATH={tools}", *command)
    daemon.run("rm", "-r", tools)
    assert done.returncode == 1
    assert "a rehearsal needs setpriv, which is not installed (sevhop upgrade --no-rehearsal" in done.stderr
    assert_as_before(daemon, guest, old)


def leases(guest: DomainGuest, virtlockd: int) -> list[str]:
    """virtlockd's locks on the guest's disk, as the kernel reports them."""
    found = guest.file("qcow2").stat()
    name = f" {virtlockd} {os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino} "
    return [line for line in Path("/proc/locks").read_text().splitlines() if name in line]


@pytest.mark.parametrize("what", some_of(["refuses", "is interrupted", "is done"], 2))
def test_lease_is_acquired_after_an_upgrade(
    daemon: Daemon, start: StartDomain, old: Path, new: Path, what: str
) -> None:
    """libvirt gives it up when the guest stops, and takes it again only in its own resume."""
    configuration = daemon.root / "etc/libvirt/qemu.conf"
    before = configuration.read_text()
    configuration.write_text(f'{before}lock_manager = "lockd"\n')
    program = daemon.start_command("/usr/sbin/virtlockd")
    try:
        wait_until((daemon.root / "run/libvirt/virtlockd-sock").exists, 30, "virtlockd listens")
        daemon.restart()
        guest = start()
        guest.wait_for_ticks()
        assert leases(guest, program.pid)
        if what == "refuses":
            report = daemon.upgrade(
                guest.name, "--no-transit", "--emulator", wrapper(daemon, "cannot-load", new, CANNOT_LOAD)
            )
            assert (report["outcome"], report["rehearsal_ms"] > 0) == ("refused", True), report
        elif what == "is interrupted":
            _, report = traced(daemon, guest, "os.kill(os.getpid(), signal.SIGINT)", "--emulator", new)
            assert report["outcome"] == "rolled-back", report
        else:
            assert daemon.upgrade(guest.name, "--no-transit", "--emulator", new)["outcome"] == "done"
        assert leases(guest, program.pid)
        assert_as_before(daemon, guest, new if what == "is done" else old)
        guest.end()
    finally:
        configuration.write_text(before)
        program.terminate()
        program.communicate(timeout=30)
        daemon.restart()


def test_upgrade_skips_rehearsal_on_request(daemon: Daemon, start: StartDomain, new: Path) -> None:
    guest = start()
    guest.wait_for_ticks()
    report = daemon.upgrade(guest.name, "--no-transit", "--emulator", new, "--no-rehearsal")
    assert report["outcome"] == "done", report
    assert "rehearse" not in [phase["name"] for phase in report["phases"]]
    guest.wait_for_ticks()
