"""
Hops that are interrupted at every step, and the result of ``sevhop recover``.

After each the guest is checked: it runs in exactly one QEMU, and has lost nothing.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.support.faults.broken_hop import BEFORE_THE_STATE_IS_SAVED, BEING_SAVED, LOADING, RUNNING, SAVED
from tests.support.faults.operator import Operator
from tests.support.faults.table import Cell
from tests.support.guests.life import lived_in
from tests.support.guests.running import Guest, processes_of, wait_ended, wait_until

from ..conftest import NoteFault, some_of
from .conftest import DescribeCounter, StartGuest
from .hops import assert_unharmed, sevhop
from .interrupted import interrupt_hop, note, recover
from .lived import LivedInGuest

PATH = "Outside libvirt: `sevhop hop`"
BITMAPS = "The same, with a persistent dirty bitmap"
LATER = "Outside libvirt: what has happened to the new QEMU when `sevhop recover` comes"
IN_THE_SOURCE = (*BEFORE_THE_STATE_IS_SAVED, *BEING_SAVED, *SAVED)
ALL = (*IN_THE_SOURCE, *LOADING, *RUNNING)
COMMANDS = [point for point in ALL if point.startswith("before ")]


#: What was done to a guest, but for dirty bitmaps: with these the new QEMU starts it only by cont.
WITHOUT_BITMAPS = ("bitmap",)


@pytest.fixture
def guest(old: Path, counter_machine: DescribeCounter, start: StartGuest) -> Guest:
    """A counting guest in the older QEMU, that has lived."""
    guest = start(lived_in(counter_machine()), old)
    guest.wait_for_ticks(3)
    return LivedInGuest.of(guest, *WITHOUT_BITMAPS)


@pytest.fixture
def marked(old: Path, counter_machine: DescribeCounter, start: StartGuest) -> LivedInGuest:
    """Likewise, with a persistent dirty bitmap."""
    guest = start(lived_in(counter_machine()), old)
    guest.wait_for_ticks(3)
    return LivedInGuest.of(guest)


@pytest.mark.parametrize("point", some_of(ALL))
def test_guest_survives_command_killed(point: str, guest: Guest, old: Path, new: Path, note_fault: NoteFault) -> None:
    assert interrupt_hop(guest, new, point, "command") == -signal.SIGKILL
    refused = sevhop("hop", "--qmp", guest.machine.monitor, "--emulator", new, "--timeout", "2")
    assert refused.returncode == 1
    assert "run: sevhop recover" in refused.stderr
    answer = recover()
    assert answer["status"] == 0, answer
    (one,) = answer["guests"]
    end = one["result"]
    assert (end, one["detail"]) in (("source", ""), ("destination", ""))
    # Only a QEMU that has read all of the state may be quicker than recover.
    assert point in LOADING or end == ("destination" if point in RUNNING else "source")
    assert os.readlink(f"/proc/{guest.pid}/exe") == str((old if end == "source" else new).resolve())
    note(note_fault, PATH, guest, point, "command", end)
    assert recover() == {"guests": [], "status": 0}
    assert sevhop("hop", "--qmp", guest.machine.monitor, "--emulator", new).returncode == 0
    assert_unharmed(guest)


@pytest.mark.parametrize("point", some_of(IN_THE_SOURCE))
def test_guest_survives_destination_killed_before_load(
    point: str, guest: Guest, new: Path, note_fault: NoteFault
) -> None:
    status = interrupt_hop(guest, new, point, "destination")
    there_is_none = point in ("phase acquire", "phase prepare", "after add-fd 0")
    assert status == (0 if there_is_none else 3)
    assert recover() == {"guests": [], "status": 0}
    note(note_fault, PATH, guest, point, "destination", "destination" if there_is_none else "source")


@pytest.mark.parametrize("point", LOADING)
def test_guest_is_resumed_or_lost_if_destination_killed_in_load(
    point: str, guest: Guest, new: Path, note_fault: NoteFault
) -> None:
    """Either the guest had run there, and is lost with it; or it had not, and is resumed in the source."""
    if interrupt_hop(guest, new, point, "destination") == 3:
        note(note_fault, PATH, guest, point, "destination", "source")
    else:
        assert recover()["status"] in (0, 5)
        assert processes_of(guest.machine.directory) == []
        note_fault(PATH, point, "destination", Cell("*ended with its QEMU*", 0, 0))


@pytest.mark.parametrize("point", some_of(RUNNING))
def test_guest_is_lost_with_destination_that_runs_it(
    point: str, guest: Guest, new: Path, note_fault: NoteFault
) -> None:
    """A guest is lost with its QEMU, hop or no hop. The state in the source is outdated, and must not run."""
    interrupt_hop(guest, new, point, "destination")
    assert recover()["status"] in (0, 5)
    assert processes_of(guest.machine.directory) == []
    note_fault(PATH, point, "destination", Cell("*ended with its QEMU*", 0, 0))


@pytest.mark.parametrize("point", some_of(BEFORE_THE_STATE_IS_SAVED))
def test_guest_is_lost_with_source_killed_before_save(
    point: str, guest: Guest, new: Path, note_fault: NoteFault
) -> None:
    """Likewise."""
    assert interrupt_hop(guest, new, point, "source") == 5
    assert recover() == {"guests": [], "status": 0}
    assert processes_of(guest.machine.directory) == []
    note_fault(PATH, point, "source", Cell("*ended with its QEMU*", 0, 0))


@pytest.mark.parametrize("point", some_of(BEING_SAVED))
def test_partly_saved_guest_never_runs_if_source_killed(
    point: str, guest: Guest, new: Path, note_fault: NoteFault
) -> None:
    """If everything had been read the guest runs in the destination; a part of it never does."""
    if interrupt_hop(guest, new, point, "source") == 0:
        note(note_fault, PATH, guest, point, "source", "destination")
    else:
        assert recover() == {"guests": [], "status": 0}
        assert processes_of(guest.machine.directory) == []
        note_fault(PATH, point, "source", Cell("*ended with its QEMU*", 0, 0))


@pytest.mark.parametrize("point", some_of((*SAVED, *LOADING, *RUNNING)))
def test_guest_survives_source_killed_after_save(point: str, guest: Guest, new: Path, note_fault: NoteFault) -> None:
    """Once its state is saved it is not needed any more."""
    assert interrupt_hop(guest, new, point, "source") == 0
    note(note_fault, PATH, guest, point, "source", "destination")


@pytest.mark.parametrize("fault", ["error", "silence"])
@pytest.mark.parametrize("point", some_of(COMMANDS))
def test_guest_survives_qemu_error_or_silence(
    point: str, fault: str, guest: Guest, new: Path, note_fault: NoteFault
) -> None:
    status = interrupt_hop(guest, new, point, fault)
    assert status == (0 if point in RUNNING else 3)
    recovered = recover()
    assert recovered["status"] == 0
    # What it could not finish it has left to be finished, and nothing else.
    assert bool(recovered["guests"]) == (point == "before x-sev-adopt-finish 0")
    note(note_fault, PATH, guest, point, fault, "source" if status else "destination")


@pytest.mark.parametrize("point", some_of(ALL))
def test_bitmaps_survive_command_killed(point: str, marked: LivedInGuest, new: Path, note_fault: NoteFault) -> None:
    """What a backup relies on is in the images that one of the two QEMUs has."""
    assert interrupt_hop(marked, new, point, "command") == -signal.SIGKILL
    answer = recover()
    assert answer["status"] == 0, answer
    (one,) = answer["guests"]
    note(note_fault, BITMAPS, marked, point, "command", one["result"])


@pytest.mark.parametrize("point", some_of((*SAVED, *LOADING, *RUNNING)))
def test_bitmaps_survive_source_killed_after_save(
    point: str, marked: LivedInGuest, new: Path, note_fault: NoteFault
) -> None:
    assert interrupt_hop(marked, new, point, "source") == 0
    note(note_fault, BITMAPS, marked, point, "source", "destination")


# -- when somebody runs sevhop recover, the world has turned -------------------------------------------


def destination_of(guest: Guest, source: int) -> int | None:
    """The new QEMU that a killed command has left."""
    others = [pid for pid in processes_of(guest.machine.directory) if pid != source]
    return others[0] if others else None


@pytest.mark.parametrize("point", some_of(ALL))
def test_guest_is_recovered_after_time_has_passed(point: str, guest: Guest, new: Path, note_fault: NoteFault) -> None:
    """A guest that runs has run on by then, and one that waits for somebody waits."""
    ticks = guest.seen().ticks
    assert interrupt_hop(guest, new, point, "command") == -signal.SIGKILL
    if point in RUNNING:
        wait_until(lambda: guest.seen().ticks > ticks + 100, 60, "it has run for a while")
    answer = recover()
    assert answer["status"] == 0, answer
    note(note_fault, LATER, guest, point, "command", answer["guests"][0]["result"])


@pytest.mark.parametrize("point", ["after x-sev-adopt-ram 0", "after migrate-incoming 0"])
def test_guest_that_was_paused_while_a_hop_was_prepared_stays_paused(
    point: str, marked: LivedInGuest, new: Path, tmp_path: Path
) -> None:
    """The command was killed before it stopped the guest, so it is not for recover to resume it."""
    paused = Operator(point, "stop", 0, "standalone", str(marked.machine.directory), str(tmp_path / "answer"))
    assert interrupt_hop(marked, new, "phase stop", "command", paused) == -signal.SIGKILL
    (one,) = recover()["guests"]
    assert (one["result"], one["detail"]) == ("source", "the guest is paused")
    assert marked.execute("query-status")["status"] == "paused"
    marked.life.do("cont")
    marked.see_unchanged()
    assert_unharmed(marked)


@pytest.mark.parametrize("point", some_of(ALL))
def test_guest_is_lost_with_exited_new_qemu_only_if_it_ran_there(
    point: str, guest: Guest, new: Path, note_fault: NoteFault
) -> None:
    """If the guest has run there it is lost, and its outdated state in the old QEMU must not run."""
    source = guest.pid
    assert interrupt_hop(guest, new, point, "command") == -signal.SIGKILL
    if destination := destination_of(guest, source):
        os.kill(destination, signal.SIGKILL)
        assert wait_ended(destination, 30)
    answer = recover()
    (one,) = answer["guests"]
    if point in LOADING:
        assert one["result"] in ("source", "gone")
    else:
        assert one["result"] == ("gone" if point in RUNNING else "source")
    if one["result"] == "source":
        note(note_fault, LATER, guest, point, "destination", "source")
    else:
        assert answer["status"] == 5
        assert processes_of(guest.machine.directory) == []
        note_fault(LATER, point, "destination", Cell("*ended with its QEMU*", 0, 0))


@pytest.mark.parametrize("point", some_of(ALL))
def test_guest_is_recovered_after_new_qemu_has_hung(point: str, guest: Guest, new: Path, note_fault: NoteFault) -> None:
    """Nobody gives up on it: when it answers again, recover finds out where the guest is."""
    source = guest.pid
    assert interrupt_hop(guest, new, point, "command") == -signal.SIGKILL
    destination = destination_of(guest, source)
    if destination:
        os.kill(destination, signal.SIGSTOP)
    done = sevhop("recover", "--timeout", "1")
    if destination and destination in processes_of(guest.machine.directory):
        assert done.returncode in (0, 4), done
        os.kill(destination, signal.SIGCONT)
    if done.returncode:
        answer = recover()
        assert answer["status"] == 0, answer
    (process,) = processes_of(guest.machine.directory)
    note(note_fault, LATER, guest, point, "hang", "destination" if process == destination else "source")


def test_rolled_back_qemu_accumulates_no_descriptors(guest: Guest, old: Path, new: Path) -> None:
    """Descriptors that it was given for a hop are removed by the rollback."""
    assert sevhop("hop", "--qmp", guest.machine.monitor, "--emulator", new).returncode == 0
    before = open_files(guest.pid)
    for _ in range(2):
        interrupt_hop(guest, old, "phase save", "command")
        assert recover()["guests"][0]["result"] == "source"
    wait_until(lambda: open_files(guest.pid) == before, 10, "its descriptors are those of the beginning")


def test_source_that_was_to_save_accumulates_no_descriptors(
    old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    """It was ordered to save when the destination is found dead, and QEMU leaks a pipe that it cannot write."""
    guest = start(counter_machine(rich=True, network=True, disk_mib=16), old)
    guest.wait_for_ticks(3)
    before = open_files(guest.pid)
    for _ in range(6):
        assert interrupt_hop(guest, new, "before stop 0", "destination") == 3
    wait_until(lambda: open_files(guest.pid) == before, 10, "its descriptors are those of the beginning")


def open_files(pid: int) -> int:
    """How many descriptors a process has."""
    return len(os.listdir(f"/proc/{pid}/fd"))
