"""
A domain whose guest cannot be reset after a hop reboots all the same: libvirt starts it again.

That is so for SEV guests; here sevhop takes a plain one for such a guest, since the rest is not SEV's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.guests.daemon import Daemon, DomainGuest
from tests.support.guests.running import wait_until

from ..conftest import some_of
from .conftest import StartDomain
from .failing import other_hook_refuses
from .holding import PausedUpgrade

_STOPS = """
import sevhop.guest.reboot

sevhop.guest.reboot.stops = lambda guest: True
"""


@pytest.fixture
def environment(tmp_path: Path) -> str:
    """For sevhop: every guest is one that cannot be reset."""
    (tmp_path / "sitecustomize.py").write_text(_STOPS)
    return f"PYTHONPATH={tmp_path}"


def run_sevhop(daemon: Daemon, environment: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run it."""
    return daemon.run("env", environment, sys.executable, "-m", "sevhop.cli", *words)


def sevhop(daemon: Daemon, environment: str, *words: str | Path) -> str:
    """Run it, which must succeed; what it prints."""
    done = run_sevhop(daemon, environment, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def upgrade(guest: DomainGuest, environment: str, emulator: Path) -> None:
    """Upgrade a domain, as one that cannot be reset afterwards."""
    output = sevhop(guest.daemon, environment, "upgrade", "--no-transit", "--json", guest.name, "--emulator", emulator)
    report = json.loads(output)["domains"][0]
    assert (report["outcome"], report["notes"]) == ("done", []), report
    directory = f"reboot/{guest.name}"
    assert guest.daemon.left_over() == [directory, f"{directory}/domain", f"{directory}/mark"]


def wait_for_restart(guest: DomainGuest) -> None:
    """Until it counts from the start, once, in another QEMU, of which nothing is recorded."""
    wait_until(lambda: guest.seen().restarts == 1, 60, "the domain is started again")
    ticks = guest.seen().ticks
    wait_until(lambda: guest.seen().ticks >= ticks + 3, 60, "it counts")
    wait_until(lambda: guest.daemon.with_arguments("cold_start") == [], 60, "nothing is about to start it")
    assert guest.seen().restarts == 1
    assert guest.daemon.left_over() == []


# In both QEMU may have exited before libvirt has the reply.


def reset_by_guest(guest: DomainGuest) -> None:
    """By the reset register of its chipset."""
    guest.daemon.run("virsh", "qemu-monitor-command", guest.name, "--hmp", "o /b 0xcf9 6")


def reset_by_host(guest: DomainGuest) -> None:
    guest.daemon.run("virsh", "reset", guest.name)


@pytest.mark.parametrize("reset", [reset_by_guest, reset_by_host])
def test_domain_that_reboots_is_started_again(
    reset: Callable[[DomainGuest], None], daemon: Daemon, start: StartDomain, old: Path, new: Path, environment: str
) -> None:
    guest = start()
    guest.wait_for_ticks(3)
    for emulator in (new, old):
        upgrade(guest, environment, emulator)
        guest.wait_for_ticks(3)
    pid = guest.pid
    reset(guest)
    wait_for_restart(guest)
    assert guest.pid != pid
    assert guest.emulator() == str(old)
    # It is like any other: what is not a reboot is not one.
    assert daemon.upgrade(guest.name, "--no-transit", "--emulator", new)["outcome"] == "done"
    assert guest.state == "running"


def test_domain_that_reboots_after_recovery_is_started_again(
    daemon: Daemon, start: StartDomain, new: Path, environment: str
) -> None:
    guest = start()
    guest.wait_for_ticks(3)
    sevhop(daemon, environment, "upgrade", "--no-transit", "--prepare", guest.name, "--emulator", new)
    sevhop(daemon, environment, "recover", guest.name)
    guest.wait_for_ticks(3)
    reset_by_guest(guest)
    wait_for_restart(guest)


@pytest.mark.parametrize("recover", [False, True])
def test_domain_that_another_client_has_restored_is_started_again(
    recover: bool, daemon: Daemon, start: StartDomain, new: Path, environment: str
) -> None:
    """No command of sevhop's is there when the guest runs, or it comes late, when the keeper has exited."""
    guest = start()
    guest.wait_for_ticks(3)
    output = sevhop(
        daemon, environment, "upgrade", "--no-transit", "--prepare", "--json", guest.name, "--emulator", new
    )
    daemon.virsh("restore", json.loads(output)["domains"][0]["image"])
    guest.wait_for_ticks(3)
    wait_until(lambda: daemon.named("sevhop-keeper") == [], 60, "the keeper exits")
    if recover:
        sevhop(daemon, environment, "recover", guest.name)
    reset_by_guest(guest)
    wait_until(lambda: guest.seen().restarts == 1, 60, "the domain is started again")
    sevhop(daemon, environment, "recover")
    wait_for_restart(guest)


def test_domain_whose_upgrade_was_rolled_back_is_started_again(
    daemon: Daemon, start: StartDomain, old: Path, new: Path, environment: str
) -> None:
    """It is in another process of the old emulator, which cannot reset it either."""
    guest = start()
    guest.wait_for_ticks(3)
    with other_hook_refuses(daemon):
        done = run_sevhop(daemon, environment, "upgrade", "--no-transit", "--json", guest.name, "--emulator", new)
    assert done.returncode == 3, done.stderr
    guest.wait_for_ticks(3)
    reset_by_guest(guest)
    wait_for_restart(guest)
    assert guest.emulator() == str(old)


@pytest.mark.parametrize("phase", some_of(["rehearse", "prepare", "stop"], 2))
def test_domain_that_reboots_before_its_next_upgrade_stops_it_is_started_again(
    phase: str, daemon: Daemon, start: StartDomain, old: Path, new: Path, environment: str
) -> None:
    """The upgrade has nothing left to do; when it is over, and not before, the domain is started."""
    guest = start()
    guest.wait_for_ticks(3)
    upgrade(guest, environment, new)
    with PausedUpgrade.at(phase, guest, old, "--no-transit", environment=environment) as paused:
        reset_by_guest(guest)
        wait_until(lambda: guest.state == "shut off", 60, "the guest has rebooted")
        wait_until(lambda: bool(daemon.with_arguments("cold_start")), 60, "the hook has run")
        refused = daemon.run("virsh", "start", guest.name)
        assert "the guest is suspended in the keeper" in refused.stderr
        report = paused.finish()
    assert report["outcome"] == "guest-lost", report
    wait_for_restart(guest)
    assert guest.emulator() == str(new)


def test_domain_that_reboots_before_its_upgrade_has_ended_is_started_again(
    daemon: Daemon, start: StartDomain, new: Path, environment: str
) -> None:
    guest = start()
    guest.wait_for_ticks(3)
    with PausedUpgrade.at("define", guest, new, "--no-transit", environment=environment) as paused:
        guest.wait_for_ticks(3)
        reset_by_guest(guest)
        wait_until(lambda: bool(daemon.with_arguments("cold_start")), 60, "the hook has run")
        assert guest.seen().restarts == 0
        report = paused.finish()
    assert (report["outcome"], report["notes"]) == ("done", []), report
    wait_for_restart(guest)
    assert guest.emulator() == str(new)


def test_domain_whose_source_was_reset_when_it_was_saved_is_not_started_twice(
    daemon: Daemon, start: StartDomain, old: Path, new: Path, environment: str
) -> None:
    """Its guest is suspended in the keeper: what runs again is that one, and no other."""
    guest = start()
    guest.wait_for_ticks(3)
    upgrade(guest, environment, new)
    guest.wait_for_ticks(3)
    mark = daemon.root / f"run/sevhop/reboot/{guest.name}/mark"
    with PausedUpgrade.at("terminate", guest, old, "--no-transit", environment=environment) as paused:
        mark.write_bytes(b"\1")  # as a reset does that comes after the last test of its state
        report = paused.finish()
    assert report["outcome"] == "done", report
    guest.wait_for_ticks(3)
    wait_until(lambda: daemon.with_arguments("cold_start") == [], 60, "nothing is about to start it")
    assert (guest.state, guest.seen().restarts) == ("running", 0)


def test_reboot_stays_a_shutdown_when_the_domains_action_is_changed(
    daemon: Daemon, start: StartDomain, new: Path, environment: str
) -> None:
    """libvirt sets QEMU's action then. The domain's own decides when it is off."""
    guest = start()
    guest.wait_for_ticks(3)
    upgrade(guest, environment, new)
    pid = guest.pid
    for action in ("destroy", "restart"):
        daemon.virsh("set-lifecycle-action", guest.name, "reboot", action, "--live")
    guest.monitor("set-action", reboot="reset")
    reset_by_guest(guest)
    wait_for_restart(guest)
    assert guest.pid != pid
    log = daemon.root / f"var/log/libvirt/qemu/{guest.name}.log"
    assert "set-action: reboot=reset means shutdown in this QEMU" in log.read_text()


def shut_down(guest: DomainGuest) -> None:
    """Its QEMU exits in peace; libvirt may report the exit as an error."""
    guest.daemon.run("virsh", "qemu-monitor-command", guest.name, json.dumps({"execute": "quit"}))


def off(guest: DomainGuest) -> None:
    """It is off, and nothing is about to start it."""
    wait_until(lambda: guest.state == "shut off", 60, "the domain is off")
    wait_until(lambda: guest.daemon.left_over() == [], 60, "the hook has run")
    assert guest.daemon.with_arguments("cold_start") == []
    assert guest.state == "shut off"


def destroy(guest: DomainGuest) -> None:
    guest.daemon.virsh("destroy", guest.name)


@pytest.mark.parametrize(
    ("end", "elements"),
    [(shut_down, ""), (destroy, ""), (reset_by_guest, "<on_reboot>destroy</on_reboot>")],
    ids=["shut down", "destroyed", "rebooted and not to be started"],
)
def test_domain_stays_off(
    end: Callable[[DomainGuest], None], elements: str, start: StartDomain, new: Path, environment: str
) -> None:
    guest = start(elements=elements)
    guest.wait_for_ticks(3)
    upgrade(guest, environment, new)
    end(guest)
    off(guest)


def test_mark_of_an_earlier_qemu_starts_nothing(
    daemon: Daemon, start: StartDomain, new: Path, environment: str
) -> None:
    guest = start()
    guest.wait_for_ticks(3)
    upgrade(guest, environment, new)
    mark = daemon.root / f"run/sevhop/reboot/{guest.name}"
    domain = (mark / "domain").read_bytes()
    daemon.virsh("destroy", guest.name)
    off(guest)
    mark.mkdir()
    (mark / "domain").write_bytes(domain)
    (mark / "mark").write_bytes(b"\1")
    daemon.virsh("start", guest.name)
    shut_down(guest)
    off(guest)


def test_domain_with_shared_firmware_reboots_in_its_qemu(daemon: Daemon, start: StartDomain, new: Path) -> None:
    """As the administrator's guide has it; a guest with SEV needs that, and a plain one does not mind."""
    arguments = "<qemu:arg value='-machine'/><qemu:arg value='aux-ram-share=on'/>"
    xmlns = "xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'"
    elements = f"<qemu:commandline {xmlns}>{arguments}</qemu:commandline>"
    guest = start(emulator=new, elements=elements)
    guest.wait_for_ticks(3)
    maps = Path(f"/proc/{guest.pid}/maps").read_text()
    assert "/memfd:pc.bios" in maps
    report = daemon.upgrade(guest.name, "--no-transit", "--emulator", new)
    assert (report["outcome"], report["notes"]) == ("done", []), report
    guest.wait_for_ticks(3)
    pid = guest.pid
    reset_by_guest(guest)
    wait_for_restart(guest)
    assert guest.pid == pid
    assert "aux-ram-share=on" in guest.xml()
