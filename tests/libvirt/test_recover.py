"""
Upgrades that are interrupted at every step, and the result of ``sevhop recover``.

After each the guest is checked: it runs, under its name, in one QEMU, and has lost nothing.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.support.faults import broken_upgrade
from tests.support.faults.broken_upgrade import HELD, IN_THE_SOURCE, RUNNING
from tests.support.faults.operator import Operator
from tests.support.faults.table import Cell
from tests.support.guests.daemon import Daemon, kill
from tests.support.guests.enclosure import GUESTS
from tests.support.guests.running import wait_until

from ..conftest import NoteFault, some_of
from . import breaking
from .breaking import recover_from_failed_step
from .conftest import StartDomain
from .lived import LivedInDomain

PATH = "A domain of libvirt: `sevhop upgrade --no-transit`"


def break_off(
    daemon: Daemon, guest: LivedInDomain, emulator: Path, point: str, fault: str, operator: Operator | None = None
) -> int:
    """Upgrade without a transit, with a fault, and perhaps somebody who does something meanwhile; the exit status."""
    return breaking.break_off(broken_upgrade, daemon, guest, emulator, point, fault, operator)


def note(
    note_fault: NoteFault,
    daemon: Daemon,
    guest: LivedInDomain,
    point: str,
    fault: str,
    old: Path,
    *,
    defined: bool = True,
) -> None:
    """See :func:`.breaking.note`."""
    breaking.note(PATH, note_fault, daemon, guest, point, fault, old, defined=defined)


def few_of(points: Iterable[str]) -> list[Any]:
    """Upgrades go by way of a transit, see test_transit_faults.py; without one is the way of a few devices only."""
    return some_of(points, 12)


@pytest.fixture
def guest(daemon: Daemon, start: StartDomain, tmp_path: Path) -> LivedInDomain:
    """A counting guest in the older QEMU, that has lived."""
    return LivedInDomain.started(daemon, start, f"guest-{tmp_path.name[-20:]}")


@pytest.mark.parametrize("point", few_of(IN_THE_SOURCE) + few_of((*HELD, *RUNNING)))
def test_recover_resumes_guest_after_command_killed(
    point: str, daemon: Daemon, guest: LivedInDomain, old: Path, new: Path, note_fault: NoteFault
) -> None:
    assert break_off(daemon, guest, new, point, "command") in (-signal.SIGKILL, 128 + signal.SIGKILL)
    answer = daemon.recover()
    assert answer["status"] == 0, answer
    (one,) = answer["guests"]
    assert one["result"] == ("source" if point in IN_THE_SOURCE else "destination")
    note(note_fault, daemon, guest, point, "command", old)
    assert daemon.recover() == {"guests": [], "status": 0}


@pytest.mark.virtqemud
@pytest.mark.parametrize("fault", some_of(["daemon", "error", "silence"]))
@pytest.mark.parametrize("point", few_of([point for point in (*IN_THE_SOURCE, *HELD, *RUNNING) if "before" in point]))
def test_guest_survives_failed_step(
    point: str, fault: str, daemon: Daemon, guest: LivedInDomain, old: Path, new: Path, note_fault: NoteFault
) -> None:
    status = break_off(daemon, guest, new, point, fault)
    defined = recover_from_failed_step(daemon, status, point, fault)
    note(note_fault, daemon, guest, point, fault, old, defined=defined)


@pytest.mark.parametrize("point", few_of((*HELD, *RUNNING)))
def test_upgrade_completes_if_source_is_killed_once_saved(
    point: str, daemon: Daemon, guest: LivedInDomain, old: Path, new: Path, note_fault: NoteFault
) -> None:
    """Once its state is saved it is not needed any more."""
    assert break_off(daemon, guest, new, point, "source") == 0
    note(note_fault, daemon, guest, point, "source", old)


@pytest.mark.parametrize("point", few_of((*IN_THE_SOURCE[1:], *HELD, *RUNNING[:-1])))
def test_upgrade_completes_if_keeper_is_killed(
    point: str, daemon: Daemon, guest: LivedInDomain, old: Path, new: Path, note_fault: NoteFault
) -> None:
    """Its supervisor restarts it, and nobody notices."""
    assert break_off(daemon, guest, new, point, "keeper") == 0
    note(note_fault, daemon, guest, point, "keeper", old)


HOOK = [
    f"{when} hook {step}"
    for step in ("stopped end", "release end", "restore begin", "prepare begin", "start begin", "started begin")
    for when in ("before", "after")
]


@pytest.mark.virtqemud
@pytest.mark.parametrize("point", few_of(HOOK))
def test_upgrade_rolls_back_only_if_killed_hook_may_refuse(
    point: str, daemon: Daemon, guest: LivedInDomain, old: Path, new: Path, note_fault: NoteFault
) -> None:
    """Once, before it has done its work or after. libvirt takes that for a refusal where the hook may refuse."""
    when, _, operation, sub = point.split()
    script, original = daemon.root / "etc/libvirt/hooks/qemu.d/sevhop", daemon.root / "run/original"
    original.write_text(script.read_text())
    original.chmod(0o755)
    text = script.read_text()
    work = '/run/original "$@"' if when == "after" else ":"
    script.write_text(
        f'#!/bin/sh\n[ "$1 $2/$3" = "{guest.name} {operation}/{sub}" ] && rm /run/armed 2>/dev/null'
        f' || exec /run/original "$@"\n{work}\nkill -9 $$\n'
    )
    (daemon.root / "run/armed").touch()
    try:
        report = daemon.upgrade(guest.name, "--no-transit", "--emulator", new)
    finally:
        script.write_text(text)
        original.unlink()
    assert not (daemon.root / "run/armed").exists()
    may_refuse = operation not in ("stopped", "release")
    assert (report["status"], report["outcome"]) == ((3, "rolled-back") if may_refuse else (0, "done")), report
    assert daemon.recover() == {"guests": [], "status": 0}
    note(note_fault, daemon, guest, point, "hook", old)


@pytest.mark.parametrize(
    ("point", "directory", "reason"),
    [
        ("phase check", "/var/lib/sevhop", "No space left on device"),
        ("phase save", "/run/sevhop", "save: cannot write the save image: No space left on device"),
    ],
)
def test_guest_stays_in_source_if_disk_is_full(
    point: str,
    directory: str,
    reason: str,
    daemon: Daemon,
    guest: LivedInDomain,
    old: Path,
    new: Path,
    note_fault: NoteFault,
) -> None:
    pid = guest.pid
    assert daemon.run("mount", "-t", "tmpfs", "-o", "size=16k,mode=711", "tmpfs", directory).returncode == 0
    try:
        report = daemon.upgrade(guest.name, "--no-transit", "--emulator", new)
        assert report["status"] in (1, 3), report
        assert reason in report["reason"]
        assert guest.pid == pid
        note(note_fault, daemon, guest, point, "room", old)
    finally:
        assert daemon.run("umount", directory).returncode == 0
    assert daemon.upgrade(guest.name, "--no-transit", "--emulator", new)["outcome"] == "done"
    guest.wait_for_ticks()


# -- when somebody runs sevhop recover, the world has turned -------------------------------------------


@pytest.mark.parametrize("point", few_of(IN_THE_SOURCE) + few_of((*HELD, *RUNNING)))
def test_recover_loses_nothing_when_run_late(
    point: str, daemon: Daemon, guest: LivedInDomain, old: Path, new: Path, note_fault: NoteFault
) -> None:
    """A guest that runs has run on by then, and one that waits for somebody waits."""
    ticks = guest.seen().ticks
    break_off(daemon, guest, new, point, "command")
    if guest.state == "running":
        wait_until(lambda: guest.seen().ticks > ticks + 100, 60, "it has run for a while")
    answer = daemon.recover()
    assert answer["status"] == 0, answer
    note(note_fault, daemon, guest, point, "command", old)


@pytest.mark.parametrize("point", few_of(RUNNING))
def test_recover_restores_no_outdated_state_if_new_qemu_exited(
    point: str, daemon: Daemon, guest: LivedInDomain, new: Path, note_fault: NoteFault
) -> None:
    """The guest has run there, so it is lost with it; its outdated state is not restored."""
    break_off(daemon, guest, new, point, "command")
    kill(guest.pid)
    wait_until(lambda: guest.state == "shut off", 60, "libvirt has noticed")
    ticks = guest.seen().ticks
    answer = daemon.recover()
    assert all(one["result"] in ("gone", "destination") for one in answer["guests"]), answer
    assert guest.state == "shut off"
    assert guest.seen().ticks == ticks
    assert daemon.left_over() == []
    note_fault(PATH, point, "destination", Cell("*ended with its QEMU*", 0, 0))


@pytest.mark.parametrize("point", few_of(RUNNING))
def test_recover_leaves_paused_guest_paused(
    point: str, daemon: Daemon, guest: LivedInDomain, old: Path, new: Path, note_fault: NoteFault
) -> None:
    """It is not let run by recover."""
    break_off(daemon, guest, new, point, "command")
    guest.life.do("stop")
    answer = daemon.recover()
    assert answer["status"] == 0, answer
    assert guest.state == "paused"
    guest.life.do("cont")
    note(note_fault, daemon, guest, point, "command", old)


@pytest.mark.parametrize("point", ["phase prepare", "phase stop"])
def test_guest_that_was_paused_while_an_upgrade_was_prepared_stays_paused(
    point: str, daemon: Daemon, guest: LivedInDomain, new: Path
) -> None:
    """The command was killed before it stopped the guest, so it is not for recover to resume it."""
    paused = Operator("phase prepare", "stop", 0, "domain", guest.name, f"{GUESTS}/{guest.name}.answer")
    break_off(daemon, guest, new, point, "command", paused)
    (one,) = daemon.recover()["guests"]
    assert one["result"] == "source"
    assert guest.state == "paused"
    guest.life.do("cont")
    guest.see_unchanged()
    guest.wait_for_ticks()
