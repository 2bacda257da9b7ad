"""
A domain with ``<launchSecurity type='sev'>`` and the policy of SEV-ES hops under a real libvirt daemon. Its guest is
halted most of the time, and only its local APIC wakes it; the second vCPU was never started.
"""

from __future__ import annotations

import base64
import json
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.guests import emulators, es_counter
from tests.support.guests.daemon import Daemon, Description, DomainGuest
from tests.support.guests.enclosure import GUESTS
from tests.support.guests.running import wait_until

from ...libvirt import dying
from ...libvirt.failing import CANNOT_LOAD, other_hook_refuses, wrapper
from ..contract.owner import packet_of
from ..contract.sev import POLICY_SEV_ES, contexts
from .launch import launch_of

POLICY = POLICY_SEV_ES | 1
#: libvirt makes no difference between kernels.
pytestmark = pytest.mark.one_kernel("6.12")

#: Starts a counting guest in a QEMU; keywords are fields of :class:`.daemon.Description`.
StartEs = Callable[..., DomainGuest]
#: Seconds for a step; everything is slow in the lab.
PATIENCE = ("--timeout", "300")
#: The way of these tests; the other one is in test_sev_transit.py.
WITHOUT = ("--no-transit",)


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    """A daemon, with sevhop's hook. Starting it and having it probe two QEMUs takes minutes in emulation."""
    with Daemon.installed() as daemon:
        yield daemon


@pytest.fixture
def start(daemon: Daemon, tmp_path: Path) -> Iterator[StartEs]:
    """Start guests, which are destroyed with the test."""
    with ExitStack() as guests:

        def one(label: str, *options: str, **fields: Any) -> DomainGuest:
            description = Description(
                f"es-{tmp_path.name[-20:]}",
                emulators.emulator(label),
                "kvm",
                32,
                vcpus=2,
                firmware=es_counter.firmware(),
                sev=True,
                policy=POLICY,
                **fields,
            )
            guest = DomainGuest.start(daemon, description, *options)
            guests.callback(guest.end)
            return guest

        yield one
    assert contexts() == []
    assert daemon.left_over() == []


def upgrade(guest: DomainGuest, label: str, way: tuple[str, ...] = WITHOUT) -> dict[str, Any]:
    """Upgrade a guest, which succeeds."""
    report = guest.daemon.upgrade(guest.name, "--emulator", emulators.emulator(label), *PATIENCE, *way)
    assert report["outcome"] == "done", report
    assert (report["context"], report["move"]["errno"], report["notes"]) == ("sev-es", 0, [])
    return report


def runs_in(guest: DomainGuest, label: str) -> None:
    """It counts in this emulator, and can hop on: QEMU has its flag that registers are protected set, if it has one."""
    assert guest.emulator() == guest.emulator("--inactive") == str(emulators.emulator(label))
    assert guest.state == "running"
    guest.wait_for_ticks(5)
    # There may be a record of what its reboot is now.
    assert [name for name in guest.daemon.left_over() if not name.startswith("reboot")] == []
    done = guest.daemon.sevhop("check", guest.name)
    assert done.returncode == 0, done.stdout
    assert f"PASS context: sev-es, policy {POLICY:#x}" in done.stdout
    assert "PASS registers: " in done.stdout


@pytest.mark.faults
def test_sev_es_domain_changes_its_qemu(start: StartEs) -> None:
    """To and fro, with its firmware in flash. libvirt and QEMU report its launch as before."""
    guest = start(emulators.OLD, pflash=True)
    runs_in(guest, emulators.OLD)
    before, context = launch_of(guest), contexts()
    assert (before["query-sev"]["state"], before["query-sev"]["policy"]) == ("running", POLICY)
    for label in (emulators.NEW, emulators.OLD):
        upgrade(guest, label)
        runs_in(guest, label)
        assert contexts() == context, "the firmware's guest is the same one"
        assert launch_of(guest) == before


@pytest.mark.faults
def test_guest_keeps_running_if_its_upgrade_fails_before_the_commit(daemon: Daemon, start: StartEs) -> None:
    """By then its QEMU was made to save all vCPU state: in the rehearsal, and after the stop."""
    guest = start(emulators.NEW)
    guest.wait_for_ticks(5)
    pid = guest.pid
    emulator = wrapper(daemon, "cannot-load", emulators.emulator(emulators.NEW), CANNOT_LOAD)
    report = daemon.upgrade(guest.name, "--emulator", emulator, *PATIENCE, *WITHOUT)
    assert (report["status"], report["outcome"]) == (1, "refused"), report
    assert report["rehearsal_ms"] > 0
    assert guest.pid == pid
    runs_in(guest, emulators.NEW)

    words = ["upgrade", "--json", guest.name, "--emulator", str(emulators.emulator(emulators.OLD)), *PATIENCE, *WITHOUT]
    report = json.loads(daemon.run(sys.executable, "-c", _REFUSED, *words).stdout)["domains"][0]
    assert report["outcome"] == "rolled-back", report
    assert "refused for a test" in report["reason"]
    assert guest.pid == pid
    runs_in(guest, emulators.NEW)

    upgrade(guest, emulators.OLD)
    runs_in(guest, emulators.OLD)


#: An upgrade whose keeper does not terminate the source.
_REFUSED = """
import sys
from sevhop.cli.main import main
from sevhop.keeper.client import KeeperClient
from sevhop.keeper.config import KeeperError

async def refuse(self):
    raise KeeperError("refused for a test")

KeeperClient.retire = refuse
sys.exit(main(sys.argv[1:]))
"""


#: The calls of an upgrade after which the source is stopped, and saves all vCPU state.
STOPPED = {
    "rehearsal": ("sevhop.engine.rehearsal", "_load_stream"),
    "save": ("sevhop.engine.upgrade_save", "save"),
}


@pytest.mark.faults
@pytest.mark.parametrize("phase", STOPPED)
def test_recover_resumes_guest_after_command_killed(daemon: Daemon, start: StartEs, tmp_path: Path, phase: str) -> None:
    """It is resumed in its QEMU, which knows again that the registers are protected."""
    guest = start(emulators.NEW)
    guest.wait_for_ticks(5)
    pid = guest.pid
    words = ["upgrade", guest.name, "--emulator", str(emulators.emulator(emulators.OLD)), *PATIENCE, *WITHOUT]
    environment = dying.after_call(tmp_path, *STOPPED[phase])
    done = daemon.run("env", environment, sys.executable, "-m", "sevhop.cli", *words)
    assert done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), done
    states(daemon).unlink()
    assert guest.state == "paused"
    assert "its flag guest_state_protected is 0" in daemon.sevhop("check", guest.name).stdout
    done = daemon.sevhop("recover")
    assert done.returncode == 0, done
    assert guest.pid == pid
    runs_in(guest, emulators.NEW)
    upgrade(guest, emulators.OLD)
    runs_in(guest, emulators.OLD)


def states(daemon: Daemon) -> Path:
    """See :data:`.dying.STATES`."""
    return daemon.root / str(dying.STATES).lstrip("/")


# -- around the commit -----------------------------------------------------------------------------


@pytest.mark.faults
def test_upgrade_is_rolled_back_if_destination_is_killed_after_the_move(daemon: Daemon, start: StartEs) -> None:
    """The context is in the destination already; libvirt kills that one, and the old emulator gets the guest again."""
    guest = start(emulators.NEW)
    guest.wait_for_ticks(5)
    with other_hook_refuses(daemon):
        report = daemon.upgrade(guest.name, "--emulator", emulators.emulator(emulators.OLD), *PATIENCE, *WITHOUT)
    assert (report["status"], report["outcome"]) == (3, "rolled-back"), report
    runs_in(guest, emulators.NEW)
    upgrade(guest, emulators.OLD)
    runs_in(guest, emulators.OLD)


@pytest.mark.faults
def test_upgrade_is_rolled_back_if_keeper_dies_in_the_move(daemon: Daemon, start: StartEs, tmp_path: Path) -> None:
    """The context is in the destination's VM by then, the destination exits, and only the supervisor has that VM."""
    guest = start(emulators.NEW)
    guest.wait_for_ticks(5)
    words = ["upgrade", "--json", guest.name, "--emulator", str(emulators.emulator(emulators.OLD)), *PATIENCE, *WITHOUT]
    environment = dying.after_call(tmp_path, "sevhop_qmp.move", "move")
    done = daemon.run("env", environment, sys.executable, "-m", "sevhop.cli", *words)
    report = json.loads(done.stdout)["domains"][0]
    states(daemon).unlink()
    assert report["outcome"] == "rolled-back", report
    runs_in(guest, emulators.NEW)
    upgrade(guest, emulators.OLD)
    runs_in(guest, emulators.OLD)


@pytest.mark.faults
def test_upgrade_is_rolled_back_if_keeper_and_destination_die_after_the_commit(daemon: Daemon, start: StartEs) -> None:
    guest = start(emulators.NEW)
    guest.wait_for_ticks(5)
    other = daemon.root / "etc/libvirt/hooks/qemu.d/zz-dying"
    program = shlex.join([sys.executable, dying.__file__, "sevhop-keeper"])
    once = f'[ "$2/$3" = started/begin ] && [ ! -e {dying.STATES} ] || exit 0'
    other.write_text(f"#!/bin/sh\n{once}\n{program} >/dev/null\nexit 1\n")
    other.chmod(0o755)
    try:
        report = daemon.upgrade(guest.name, "--emulator", emulators.emulator(emulators.OLD), *PATIENCE, *WITHOUT)
        assert report["outcome"] == "rolled-back", report
        assert states(daemon).read_text() == "committed"
    finally:
        other.unlink()
        states(daemon).unlink(missing_ok=True)
    runs_in(guest, emulators.NEW)
    upgrade(guest, emulators.OLD)
    runs_in(guest, emulators.OLD)


# -- the owner of the guest ------------------------------------------------------------------------

#: What the owner of a guest prepares for its launch, and injects when he has seen the measurement.
SESSION = base64.b64encode(bytes(256)).decode()
LAUNCH = f"<dhCert>{SESSION}</dhCert><session>{SESSION}</session>"
#: What the guest prints of the secret.
SECRET = "12345678"


@pytest.mark.parametrize(
    "way", [pytest.param((), id="transit"), pytest.param(WITHOUT, id="without", marks=pytest.mark.faults)]
)
def test_attested_guest_keeps_its_secret(daemon: Daemon, start: StartEs, way: tuple[str, ...]) -> None:
    """Its owner injects it when the measurement is known, before the guest runs; only when it has run can it hop."""
    guest = start(emulators.OLD, "--paused", launch=LAUNCH)
    measured = daemon.virsh("domlaunchsecinfo", guest.name)
    assert guest.monitor("query-sev")["return"]["state"] == "launch-secret"
    report = daemon.upgrade(guest.name, "--emulator", emulators.emulator(emulators.NEW), *PATIENCE, *WITHOUT)
    assert (report["status"], report["outcome"]) == (1, "refused"), report
    assert "state: the guest is prelaunch (resume it" in report["reason"]

    inject(guest, base64.b64decode(guest.monitor("query-sev-launch-measure")["return"]["data"]))
    daemon.virsh("resume", guest.name)
    wait_for_secret(guest)
    for label in (emulators.NEW, emulators.OLD):
        upgrade(guest, label, way)
        wait_for_secret(guest)
        runs_in(guest, label)
        assert daemon.virsh("domlaunchsecinfo", guest.name) == measured


def inject(guest: DomainGuest, measurement: bytes) -> None:
    """Send the secret to the firmware, by libvirt."""
    words: list[str | Path] = []
    packet = packet_of(es_counter.SECRET_MAGIC + SECRET.encode(), measurement[:32])
    for name, content in zip(("secrethdr", "secret"), packet, strict=True):
        guest.file(name).write_text(base64.b64encode(content).decode())
        words += [f"--{name}", GUESTS / f"{guest.name}.{name}"]
    guest.daemon.virsh("domsetlaunchsecstate", guest.name, *words, "--set-address", str(es_counter.SECRET_AT))


def wait_for_secret(guest: DomainGuest) -> None:
    """Wait until the guest prints its secret, again."""

    def printed() -> int:
        return guest.file("log").read_text(errors="replace").count(f"\nSECRET {SECRET}\n")

    wanted = printed() + 2  # one may have been printed already
    wait_until(lambda: printed() >= wanted, 150, "the guest prints its secret")
