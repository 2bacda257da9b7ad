"""
While a guest is stopped nothing is waited for longer than ``--timeout``: what hangs is ended, or left, and the guest is
where it is safe.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.support.guests.daemon import Daemon, DomainGuest, kill, process_file
from tests.support.guests.running import wait_until

from ..conftest import some_of
from .conftest import StartDomain
from .failing import assert_as_before, wrapper
from .holding import PausedUpgrade

#: Seconds; generous for what does not hang.
LIMIT = 6

#: A destination that stops itself: as soon as it is started, or when libvirt and the keeper have its monitors.
HANGING = {
    "at its start": "case $SEVHOP_KEEPER in /*) kill -STOP $$;; esac",
    "when it has its monitors": """case $SEVHOP_KEEPER in /*)
    monitor=${SEVHOP_KEEPER%/*}/monitor/qmp
    ( while [ ! -S $monitor ]; do kill -0 $$ || exit; done; kill -STOP $$ ) </dev/null >/dev/null 2>&1 &
    esac""",
}


def state_of(pid: int) -> str:
    """As the kernel reports it; ``X`` when it has exited."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except FileNotFoundError:
        return "X"


def hanging(guest: DomainGuest, source: int) -> list[int]:
    """The destinations that have stopped themselves. They are in mount namespaces of their own."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    started = f"guest={guest.name},".encode()
    lines = {pid: process_file(pid, "cmdline") for pid in pids}
    return [pid for pid, line in lines.items() if pid != source and started in line and state_of(pid) == "T"]


@pytest.mark.parametrize("when", some_of(list(HANGING)))
def test_destination_that_hangs_is_ended(daemon: Daemon, start: StartDomain, old: Path, new: Path, when: str) -> None:
    guest = start()
    guest.wait_for_ticks()
    source = guest.pid
    emulator = wrapper(daemon, "hanging", new, HANGING[when])
    report = daemon.upgrade(
        guest.name, "--emulator", emulator, "--no-transit", "--no-rehearsal", "--timeout", str(LIMIT)
    )
    assert (report["status"], report["outcome"]) == (3, "rolled-back"), report
    assert f"does not run within {LIMIT} s, and was ended" in report["reason"]
    # It is waited for once, and the guest is restored in the old emulator.
    assert report["downtime_ms"] < 2e3 * LIMIT
    assert hanging(guest, source) == []
    assert_as_before(daemon, guest, old)


def test_recover_ends_a_destination_that_hangs(daemon: Daemon, start: StartDomain, old: Path, new: Path) -> None:
    guest = start()
    guest.wait_for_ticks()
    source = guest.pid
    emulator = wrapper(daemon, "hanging", new, HANGING["when it has its monitors"])
    arguments = [
        "upgrade",
        guest.name,
        "--emulator",
        str(emulator),
        "--no-transit",
        "--no-rehearsal",
        "--timeout",
        "600",
    ]
    command = daemon.start_command(sys.executable, "-m", "sevhop.cli", *arguments)
    wait_until(lambda: bool(hanging(guest, source)), 60, "the destination hangs")
    kill(command.pid)
    command.communicate()
    # Also the old emulator must be restored in that time.
    done = daemon.sevhop("recover", guest.name, "--timeout", str(2 * LIMIT))
    assert done.returncode == 0, done
    wait_until(lambda: hanging(guest, source) == [], 10, "the destination that hangs has exited")
    assert_as_before(daemon, guest, old)


@pytest.mark.parametrize(
    "phase", [*(pytest.param(phase, marks=pytest.mark.faults) for phase in ("save", "terminate")), "restore"]
)
def test_command_ends_if_the_keeper_hangs(daemon: Daemon, start: StartDomain, new: Path, old: Path, phase: str) -> None:
    """Before the old QEMU is terminated the guest is resumed there; afterwards it waits for the keeper."""
    guest = start()
    guest.wait_for_ticks()
    with PausedUpgrade.at(phase, guest, new, "--no-transit", "--timeout", str(LIMIT)) as upgrade:
        keepers = daemon.named("sevhop-keeper")
        try:
            for pid in keepers:
                os.kill(pid, signal.SIGSTOP)
            report = upgrade.finish()
        finally:
            for pid in keepers:
                os.kill(pid, signal.SIGCONT)
    assert report["outcome"] in ("rolled-back", "recovery-required"), report
    if phase == "save":
        assert guest.state == "running"
    assert daemon.sevhop("recover").returncode == 0
    assert guest.state == "running"
    guest.wait_for_ticks()
    wait_until(lambda: daemon.left_over() == [], 30, "the keeper exits")
