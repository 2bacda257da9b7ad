"""
Upgrades by way of a transit that are interrupted at every step, and the result of ``sevhop recover``.

After each the guest is checked: it runs, under its name, in one QEMU, and has lost nothing. The second hop is
interrupted in test_transit_restore.py and test_transit_recover.py.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.support.faults import broken_transit
from tests.support.faults.broken_transit import IN_THE_SOURCE, IN_TRANSIT, KEPT, RESTORED, SAVED
from tests.support.faults.operator import Operator
from tests.support.guests.daemon import Daemon
from tests.support.guests.enclosure import GUESTS
from tests.support.guests.running import wait_until

from ..conftest import NoteFault, some_of
from . import breaking
from .breaking import recover_from_failed_step
from .conftest import StartDomain
from .lived import LivedInDomain

PATH = "A domain of libvirt: `sevhop upgrade`"
_ALL = (*IN_THE_SOURCE, *SAVED, *IN_TRANSIT, *RESTORED)


@pytest.fixture
def guest(daemon: Daemon, start: StartDomain, tmp_path: Path) -> LivedInDomain:
    """A counting guest in the older QEMU, that has lived."""
    return LivedInDomain.started(daemon, start, f"guest-{tmp_path.name[-20:]}")


def break_off(daemon: Daemon, guest: LivedInDomain, emulator: Path, point: str, fault: str) -> int:
    return breaking.break_off(broken_transit, daemon, guest, emulator, point, fault)


def note(
    note_fault: NoteFault, daemon: Daemon, guest: LivedInDomain, point: str, fault: str, old: Path, defined: bool = True
) -> None:
    wait_until(lambda: daemon.left_over() == [], 60, "the keeper exits")
    breaking.note(PATH, note_fault, daemon, guest, point, fault, old, defined=defined)


@pytest.mark.parametrize("point", some_of((*IN_THE_SOURCE, *SAVED)) + some_of((*IN_TRANSIT, *RESTORED)))
def test_recover_finds_the_guest_after_command_killed(
    point: str, daemon: Daemon, guest: LivedInDomain, old: Path, new: Path, note_fault: NoteFault
) -> None:
    assert break_off(daemon, guest, new, point, "command") in (-signal.SIGKILL, 128 + signal.SIGKILL)
    answer = daemon.recover()
    assert answer["status"] == 0, answer
    (one,) = answer["guests"]
    assert one["result"] == ("source" if point in (*IN_THE_SOURCE, *SAVED) else "destination")
    note(note_fault, daemon, guest, point, "command", old)
    assert daemon.recover() == {"guests": [], "status": 0}


@pytest.mark.parametrize("fault", ["daemon", "error", "silence"])
@pytest.mark.parametrize("point", some_of([point for point in _ALL if "before" in point]))
def test_guest_survives_failed_step(
    point: str, fault: str, daemon: Daemon, guest: LivedInDomain, old: Path, new: Path, note_fault: NoteFault
) -> None:
    status = break_off(daemon, guest, new, point, fault)
    defined = recover_from_failed_step(daemon, status, point, fault)
    note(note_fault, daemon, guest, point, fault, old, defined=defined)


@pytest.mark.parametrize(
    ("point", "fault"), [("phase finish", "command"), ("phase keep", "command"), ("before keeper status 0", "silence")]
)
def test_setting_that_libvirt_does_not_know_survives(
    point: str, fault: str, daemon: Daemon, guest: LivedInDomain, new: Path
) -> None:
    """Whoever finishes the upgrade."""
    limits = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops_rd", "iops_wr"), 0)
    guest.monitor("block_set_io_throttle", id="/machine/peripheral/virtio-disk0/virtio-backend", iops=123456, **limits)
    guest.remember()
    break_off(daemon, guest, new, point, fault)
    answer = daemon.recover()
    assert answer["status"] == 0, answer
    assert guest.emulator() == str(new)
    guest.see_unchanged()


@pytest.mark.parametrize("point", ["phase acquire", "phase prepare"])
def test_domain_that_is_changed_while_the_transit_starts_stays_in_source(
    point: str, daemon: Daemon, guest: LivedInDomain, new: Path, tmp_path: Path
) -> None:
    """The destination would be started from what libvirt knew before."""
    pid, answer = guest.pid, f"{GUESTS}/{guest.name}.answer"
    operator = Operator(point, "throttle", 1, "domain", guest.name, answer)
    assert breaking.break_off(broken_transit, daemon, guest, new, "phase check", "none", operator) == 3
    assert guest.pid == pid
    assert daemon.upgrade(guest.name, "--emulator", new)["outcome"] == "done"
    (iops,) = (value for name, value in guest.life.facts().items() if name == "throttle virtio-disk0")
    assert f"<total_iops_sec>{iops}</total_iops_sec>" in daemon.virsh("dumpxml", guest.name)


@pytest.mark.parametrize("point", some_of((*SAVED, *IN_TRANSIT, *RESTORED)))
def test_upgrade_completes_if_source_is_killed_once_saved(
    point: str, daemon: Daemon, guest: LivedInDomain, old: Path, new: Path, note_fault: NoteFault
) -> None:
    """The transit has all that it needs."""
    status = break_off(daemon, guest, new, point, "source")
    if status:
        answer = daemon.recover()
        assert (status, answer["status"]) == (4, 0), answer
    note(note_fault, daemon, guest, point, "source", old)


@pytest.mark.parametrize("point", some_of((*IN_THE_SOURCE[2:], *SAVED)))
def test_guest_stays_in_source_if_transit_is_killed(
    point: str, daemon: Daemon, guest: LivedInDomain, old: Path, new: Path, note_fault: NoteFault
) -> None:
    """Before it has the guest."""
    pid = guest.pid
    assert break_off(daemon, guest, new, point, "destination") == 3
    assert guest.pid == pid
    note(note_fault, daemon, guest, point, "destination", old)


@pytest.mark.parametrize("point", some_of(KEPT))
def test_upgrade_completes_if_keeper_is_killed(
    point: str, daemon: Daemon, guest: LivedInDomain, old: Path, new: Path, note_fault: NoteFault
) -> None:
    """Its supervisor restarts it."""
    status = break_off(daemon, guest, new, point, "keeper")
    if status:
        answer = daemon.recover()
        assert (status, answer["status"]) == (4, 0), answer
    note(note_fault, daemon, guest, point, "keeper", old)
