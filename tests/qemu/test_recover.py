"""
Hops that are broken off at every step, and what ``sevhop recover`` makes of them.

After each the guest is counted: it goes on, in one QEMU and one only, and has lost nothing.
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
from .broken_off import break_off, note, recover
from .conftest import DescribeCounter, StartGuest
from .hops import assert_unharmed, sevhop
from .lived import LivedInGuest

PATH = "Outside libvirt: `sevhop hop`"
BITMAPS = "The same, with a persistent dirty bitmap"
LATER = "Outside libvirt: what has happened to the new QEMU when `sevhop recover` comes"
IN_THE_SOURCE = (*BEFORE_THE_STATE_IS_SAVED, *BEING_SAVED, *SAVED)
ALL = (*IN_THE_SOURCE, *LOADING, *RUNNING)
COMMANDS = [point for point in ALL if point.startswith("before ")]


#: What is done to a guest, but for dirty bitmaps: with these the new QEMU lets it run only when it is told to.
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
def test_the_command_is_killed(point: str, guest: Guest, old: Path, new: Path, note_fault: NoteFault) -> None:
    assert break_off(guest, new, point, "command") == -signal.SIGKILL
    refused = sevhop("hop", "--source", guest.machine.monitor, "--emulator", new, "--timeout", "2")
    assert refused.returncode == 1
    assert "run: sevhop recover" in refused.stderr
    answer = recover()
    assert answer["status"] == 0, answer
    (one,) = answer["guests"]
    end = one["end"]
    assert (end, one["text"]) in (("source", ""), ("destination", ""))
    # Only a QEMU that has got the end of the state may be quicker than recover.
    assert point in LOADING or end == ("destination" if point in RUNNING else "source")
    assert os.readlink(f"/proc/{guest.pid}/exe") == str((old if end == "source" else new).resolve())
    note(note_fault, PATH, guest, point, "command", end)
    assert recover() == {"guests": [], "status": 0}
    assert sevhop("hop", "--source", guest.machine.monitor, "--emulator", new).returncode == 0
    assert_unharmed(guest)


@pytest.mark.parametrize("point", some_of(IN_THE_SOURCE))
def test_the_destination_is_killed(point: str, guest: Guest, new: Path, note_fault: NoteFault) -> None:
    status = break_off(guest, new, point, "destination")
    there_is_none = point in ("phase hold", "phase prepare", "after add-fd 0")
    assert status == (0 if there_is_none else 3)
    assert recover() == {"guests": [], "status": 0}
    note(note_fault, PATH, guest, point, "destination", "destination" if there_is_none else "source")


@pytest.mark.parametrize("point", LOADING)
def test_the_destination_is_killed_while_it_loads(
    point: str, guest: Guest, new: Path, note_fault: NoteFault
) -> None:
    """Either it had let the guest run, and it ended with it; or it had not, and the guest goes on in the source."""
    if break_off(guest, new, point, "destination") == 3:
        note(note_fault, PATH, guest, point, "destination", "source")
    else:
        assert recover()["status"] in (0, 5)
        assert processes_of(guest.machine.directory) == []
        note_fault(PATH, point, "destination", Cell("*ended with its QEMU*", 0, 0))


@pytest.mark.parametrize("point", some_of(RUNNING))
def test_the_destination_is_killed_with_the_guest(
    point: str, guest: Guest, new: Path, note_fault: NoteFault
) -> None:
    """A guest ends with its QEMU, hop or no hop. The source has what it was before, and must not run."""
    break_off(guest, new, point, "destination")
    assert recover()["status"] in (0, 5)
    assert processes_of(guest.machine.directory) == []
    note_fault(PATH, point, "destination", Cell("*ended with its QEMU*", 0, 0))


@pytest.mark.parametrize("point", some_of(BEFORE_THE_STATE_IS_SAVED))
def test_the_source_is_killed_with_the_guest(point: str, guest: Guest, new: Path, note_fault: NoteFault) -> None:
    """Likewise."""
    assert break_off(guest, new, point, "source") == 5
    assert recover() == {"guests": [], "status": 0}
    assert processes_of(guest.machine.directory) == []
    note_fault(PATH, point, "source", Cell("*ended with its QEMU*", 0, 0))


@pytest.mark.parametrize("point", some_of(BEING_SAVED))
def test_the_source_is_killed_while_it_is_saved(point: str, guest: Guest, new: Path, note_fault: NoteFault) -> None:
    """If everything had been read the guest goes on in the destination, and not a part of it."""
    if break_off(guest, new, point, "source") == 0:
        note(note_fault, PATH, guest, point, "source", "destination")
    else:
        assert recover() == {"guests": [], "status": 0}
        assert processes_of(guest.machine.directory) == []
        note_fault(PATH, point, "source", Cell("*ended with its QEMU*", 0, 0))


@pytest.mark.parametrize("point", some_of((*SAVED, *LOADING, *RUNNING)))
def test_the_source_is_killed(point: str, guest: Guest, new: Path, note_fault: NoteFault) -> None:
    """Once its state is saved it is not needed any more."""
    assert break_off(guest, new, point, "source") == 0
    note(note_fault, PATH, guest, point, "source", "destination")


@pytest.mark.parametrize("fault", ["error", "silence"])
@pytest.mark.parametrize("point", some_of(COMMANDS))
def test_qemu_refuses_or_does_not_answer(
    point: str, fault: str, guest: Guest, new: Path, note_fault: NoteFault
) -> None:
    status = break_off(guest, new, point, fault)
    assert status == (0 if point in RUNNING else 3)
    recovered = recover()
    assert recovered["status"] == 0
    # What it could not finish it has left to be finished, and nothing else.
    assert bool(recovered["guests"]) == (point == "before x-sev-adopt-finish 0")
    note(note_fault, PATH, guest, point, fault, "source" if status else "destination")


@pytest.mark.parametrize("point", some_of(ALL))
def test_the_command_is_killed_and_bitmaps_stay(
    point: str, marked: LivedInGuest, new: Path, note_fault: NoteFault
) -> None:
    """What a backup relies on is in the images that one of the two QEMUs has."""
    assert break_off(marked, new, point, "command") == -signal.SIGKILL
    answer = recover()
    assert answer["status"] == 0, answer
    (one,) = answer["guests"]
    note(note_fault, BITMAPS, marked, point, "command", one["end"])


@pytest.mark.parametrize("point", some_of((*SAVED, *LOADING, *RUNNING)))
def test_the_source_is_killed_and_bitmaps_stay(
    point: str, marked: LivedInGuest, new: Path, note_fault: NoteFault
) -> None:
    assert break_off(marked, new, point, "source") == 0
    note(note_fault, BITMAPS, marked, point, "source", "destination")


# -- when somebody runs sevhop recover, the world has turned -------------------------------------------


def destination_of(guest: Guest, source: int) -> int | None:
    """The new QEMU that a killed command has left."""
    others = [pid for pid in processes_of(guest.machine.directory) if pid != source]
    return others[0] if others else None


@pytest.mark.parametrize("point", some_of(ALL))
def test_time_passes_before_recover(point: str, guest: Guest, new: Path, note_fault: NoteFault) -> None:
    """A guest that runs has run on by then, and one that waits for somebody waits."""
    ticks = guest.seen().ticks
    assert break_off(guest, new, point, "command") == -signal.SIGKILL
    if point in RUNNING:
        wait_until(lambda: guest.seen().ticks > ticks + 100, 60, "it has run for a while")
    answer = recover()
    assert answer["status"] == 0, answer
    note(note_fault, LATER, guest, point, "command", answer["guests"][0]["end"])


@pytest.mark.parametrize("point", ["after x-sev-adopt-ram 0", "after migrate-incoming 0"])
def test_guest_that_was_paused_while_a_hop_was_prepared_stays_paused(
    point: str, marked: LivedInGuest, new: Path, tmp_path: Path
) -> None:
    """The command was killed before it stopped the guest, so it is not for recover to resume it."""
    paused = Operator(point, "stop", 0, str(marked.machine.directory), str(tmp_path / "answer"))
    assert break_off(marked, new, "phase freeze", "command", paused) == -signal.SIGKILL
    (one,) = recover()["guests"]
    assert (one["end"], one["text"]) == ("source", "the guest is paused")
    assert marked.execute("query-status")["status"] == "paused"
    marked.life.do("cont")
    marked.see_unchanged()
    assert_unharmed(marked)


@pytest.mark.parametrize("point", some_of(ALL))
def test_the_new_qemu_ends_before_recover(point: str, guest: Guest, new: Path, note_fault: NoteFault) -> None:
    """If the guest has run in there it has ended with it, and nobody may run what is left of it in the old one."""
    source = guest.pid
    assert break_off(guest, new, point, "command") == -signal.SIGKILL
    if destination := destination_of(guest, source):
        os.kill(destination, signal.SIGKILL)
        assert wait_ended(destination, 30)
    answer = recover()
    (one,) = answer["guests"]
    if point in LOADING:
        assert one["end"] in ("source", "gone")
    else:
        assert one["end"] == ("gone" if point in RUNNING else "source")
    if one["end"] == "source":
        note(note_fault, LATER, guest, point, "destination", "source")
    else:
        assert answer["status"] == 5
        assert processes_of(guest.machine.directory) == []
        note_fault(LATER, point, "destination", Cell("*ended with its QEMU*", 0, 0))


@pytest.mark.parametrize("point", some_of(ALL))
def test_the_new_qemu_hangs_when_recover_comes(point: str, guest: Guest, new: Path, note_fault: NoteFault) -> None:
    """Nobody gives up on it: when it answers again, recover finds out where the guest is."""
    source = guest.pid
    assert break_off(guest, new, point, "command") == -signal.SIGKILL
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


def test_nothing_piles_up_in_a_qemu_that_goes_on(guest: Guest, old: Path, new: Path) -> None:
    """Descriptors that it was given for a hop are taken from it again by whoever undoes that hop."""
    assert sevhop("hop", "--source", guest.machine.monitor, "--emulator", new).returncode == 0
    before = open_files(guest.pid)
    for _ in range(2):
        break_off(guest, old, "phase save", "command")
        assert recover()["guests"][0]["end"] == "source"
    wait_until(lambda: open_files(guest.pid) == before, 10, "its descriptors are those of the beginning")


def test_nothing_piles_up_in_a_source_that_was_to_save(
    old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    """It has been told to save when the destination is found dead, and QEMU forgets a pipe that it cannot write."""
    guest = start(counter_machine(rich=True, network=True, disk_mib=16), old)
    guest.wait_for_ticks(3)
    before = open_files(guest.pid)
    for _ in range(6):
        assert break_off(guest, new, "before stop 0", "destination") == 3
    wait_until(lambda: open_files(guest.pid) == before, 10, "its descriptors are those of the beginning")


def open_files(pid: int) -> int:
    """How many descriptors a process has."""
    return len(os.listdir(f"/proc/{pid}/fd"))
