"""
A domain whose guest cannot be reset after a hop reboots all the same: libvirt starts it again.

That is so for SEV guests; here sevhop takes a plain one for such a guest, since the rest is not SEV's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.guests.daemon import Daemon, DomainGuest
from tests.support.guests.running import wait_until

from .conftest import StartDomain

_STOPS = """
import sevhop.guest.reboot

sevhop.guest.reboot.stops = lambda guest: True
"""


@pytest.fixture
def environment(tmp_path: Path) -> str:
    """For sevhop: every guest is one that cannot be reset."""
    (tmp_path / "sitecustomize.py").write_text(_STOPS)
    return f"PYTHONPATH={tmp_path}"


def sevhop(daemon: Daemon, environment: str, *words: str | Path) -> str:
    """Run it; what it prints."""
    done = daemon.run("env", environment, sys.executable, "-m", "sevhop.cli", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def upgrade(guest: DomainGuest, environment: str, emulator: Path) -> None:
    """Upgrade a domain, as one that cannot be reset afterwards."""
    output = sevhop(guest.daemon, environment, "upgrade", "--json", guest.name, "--emulator", emulator)
    report = json.loads(output)["domains"][0]
    assert (report["outcome"], report["notes"]) == ("done", []), report
    directory = f"reboot/{guest.name}"
    assert guest.daemon.left_over() == [directory, f"{directory}/domain", f"{directory}/mark"]


def wait_for_restart(guest: DomainGuest) -> None:
    """Until it counts from the start, in another QEMU, of which nothing is recorded."""
    wait_until(lambda: guest.seen().restarts == 1, 60, "the domain is started again")
    assert guest.daemon.left_over() == []


def reset_by_guest(guest: DomainGuest) -> None:
    """By the reset register of its chipset."""
    # QEMU may have exited before libvirt has the reply.
    guest.daemon.run("virsh", "qemu-monitor-command", guest.name, "--hmp", "o /b 0xcf9 6")


def reset_by_host(guest: DomainGuest) -> None:
    guest.daemon.virsh("reset", guest.name)


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
    assert daemon.upgrade(guest.name, "--emulator", new)["outcome"] == "done"
    assert guest.state == "running"


def test_domain_that_reboots_after_recovery_is_started_again(
    daemon: Daemon, start: StartDomain, new: Path, environment: str
) -> None:
    guest = start()
    guest.wait_for_ticks(3)
    sevhop(daemon, environment, "upgrade", "--prepare", guest.name, "--emulator", new)
    sevhop(daemon, environment, "recover", guest.name)
    guest.wait_for_ticks(3)
    reset_by_guest(guest)
    wait_for_restart(guest)


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


@pytest.mark.parametrize("end", [shut_down, destroy])
def test_domain_that_is_shut_down_or_destroyed_stays_off(
    end: Callable[[DomainGuest], None], start: StartDomain, new: Path, environment: str
) -> None:
    guest = start()
    guest.wait_for_ticks(3)
    upgrade(guest, environment, new)
    end(guest)
    off(guest)


def test_domain_stays_off_after_a_reboot_if_that_is_its_action(
    daemon: Daemon, start: StartDomain, new: Path, environment: str
) -> None:
    guest = start(elements="<on_reboot>destroy</on_reboot>")
    guest.wait_for_ticks(3)
    upgrade(guest, environment, new)
    reset_by_guest(guest)
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
    report = daemon.upgrade(guest.name, "--emulator", new)
    assert (report["outcome"], report["notes"]) == ("done", []), report
    guest.wait_for_ticks(3)
    pid = guest.pid
    reset_by_guest(guest)
    wait_for_restart(guest)
    assert guest.pid == pid
    assert "aux-ram-share=on" in guest.xml()
