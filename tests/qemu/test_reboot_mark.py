"""The mark of a QEMU that has shut down because it was to be reset."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from sevhop.guest.runtime_settings import actions
from sevhop_qmp import adopt_library
from sevhop_qmp.errors import CommandError
from sevhop_qmp.process import QemuProcess

from tests.support.guests import emulators
from tests.support.guests.running import wait_until

from .adopting import TIMEOUT, Destination, Keeper, Memory, machine

EVERY_EMULATOR = pytest.mark.parametrize("label", [emulators.OLD, emulators.NEW, emulators.UNSTABLE])


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    path = tmp_path / "mark"
    path.write_bytes(b"\0")
    return path


def with_mark(emulator: Path, mark: Path) -> Destination:
    """A QEMU that uses this file, and nothing else of the library."""
    environment = dict(os.environ) | adopt_library.preloading({})
    destination = Destination([emulator, *machine("tcg", incoming=False)], environment)
    try:
        give(destination, mark)
    except BaseException:
        destination.kill()
        raise
    return destination


def give(destination: Destination, mark: Path) -> None:
    with mark.open("r+b") as file:
        destination.send_fd("mark", file.fileno())
    assert destination.execute("x-sev-reboot-mark", {"fd": "mark"}) == {}


def guest_reset(destination: Destination) -> None:
    """What a guest does by the reset register of its chipset."""
    destination.hmp("o /b 0xcf9 6")


def host_reset(destination: Destination) -> None:
    """``virsh reset``."""
    destination.execute("system_reset")


def host_quit(destination: Destination) -> None:
    """``virsh destroy``, in a gentle way."""
    destination.execute("quit")


@EVERY_EMULATOR
@pytest.mark.parametrize(("end", "byte"), [(guest_reset, b"\1"), (host_reset, b"\1"), (host_quit, b"\0")])
def test_mark_is_set_by_a_shutdown_that_was_to_be_a_reset(
    end: Callable[[Destination], None], byte: bytes, label: str, emulator: Callable[[str], Path], mark: Path
) -> None:
    with with_mark(emulator(label), mark) as destination:
        destination.execute("set-action", {"reboot": "shutdown"})
        end(destination)
        assert destination.exited()[0] == 0
    assert mark.read_bytes() == byte


@EVERY_EMULATOR
def test_mark_is_not_set_by_a_reset(label: str, emulator: Callable[[str], Path], mark: Path) -> None:
    with with_mark(emulator(label), mark) as destination:
        guest_reset(destination)
        assert destination.execute("query-status")["status"] == "prelaunch"
        host_quit(destination)
        assert destination.exited()[0] == 0
    assert mark.read_bytes() == b"\0"


def guest_power_off(destination: Destination) -> None:
    """What a guest does by the ACPI registers of its chipset (ICH9), after its firmware has enabled them."""
    lpc = 0x8000F800
    for register, command in ((0x40, "o /w 0xcfc 0x601"), (0x44, "o /b 0xcfc 0x80"), (0, "o /h 0x604 0x2000")):
        assert destination.hmp(f"o /w 0xcf8 {lpc + register:#x}") == ""
        assert destination.hmp(command) == ""


@EVERY_EMULATOR
def test_mark_is_cleared_by_a_later_power_off(label: str, emulator: Callable[[str], Path], mark: Path) -> None:
    """QEMU may stay when its guest has shut down, and may be ordered to reset and run it after all."""
    with with_mark(emulator(label), mark) as destination:
        destination.execute("set-action", {"reboot": "shutdown", "shutdown": "pause"})
        guest_reset(destination)
        wait_until(lambda: mark.read_bytes() == b"\1", TIMEOUT, "the reset is recorded")
        destination.execute("set-action", {"reboot": "reset", "shutdown": "poweroff"})
        host_reset(destination)
        guest_power_off(destination)
        assert destination.exited()[0] == 0
    assert mark.read_bytes() == b"\0"


@EVERY_EMULATOR
def test_mark_stays_when_libvirt_ends_qemu(label: str, emulator: Callable[[str], Path], mark: Path) -> None:
    """By a signal, which is another shutdown to QEMU."""
    with with_mark(emulator(label), mark) as destination:
        destination.execute("set-action", {"reboot": "shutdown", "shutdown": "pause"})
        guest_reset(destination)
        wait_until(lambda: mark.read_bytes() == b"\1", TIMEOUT, "the reset is recorded")
        destination.execute("set-action", {"shutdown": "poweroff"})
        destination.process.terminate()
        assert destination.exited()[0] == 0
    assert mark.read_bytes() == b"\1"


def test_last_mark_counts_and_no_descriptor_is_kept(new: Path, mark: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"\0")
    with with_mark(new, mark) as destination:
        give(destination, other)
        open_files = {os.readlink(path) for path in Path(f"/proc/{destination.pid}/fd").iterdir()}
        assert not {str(mark), str(other)} & open_files
        assert str(mark) not in Path(f"/proc/{destination.pid}/maps").read_text()
        destination.execute("set-action", {"reboot": "shutdown"})
        host_reset(destination)
        assert destination.exited()[0] == 0
    assert (mark.read_bytes(), other.read_bytes()) == (b"\0", b"\1")


def test_invalid_mark_is_refused(new: Path, mark: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    with with_mark(new, mark) as destination:
        with pytest.raises(CommandError, match="The reboot mark cannot be used: Invalid argument"):
            give(destination, empty)
        with pytest.raises(CommandError, match="File descriptor named 'none' has not been found"):
            destination.execute("x-sev-reboot-mark", {"fd": "none"})
        with pytest.raises(CommandError, match="Parameter 'fd' is missing"):
            destination.execute("x-sev-reboot-mark")
        with pytest.raises(CommandError, match="Parameter is unexpected"):
            destination.execute("x-sev-reboot-mark", {"fd": "mark", "surprise": 1})
        destination.execute("set-action", {"reboot": "shutdown"})
        host_reset(destination)
        assert destination.exited()[0] == 0
    assert mark.read_bytes() == b"\1", "the one before is used"


@EVERY_EMULATOR
@pytest.mark.parametrize("stops", [True, False])
def test_reboot_stays_a_shutdown_if_the_guest_cannot_be_reset(
    stops: bool, label: str, emulator: Callable[[str], Path]
) -> None:
    """Other actions are set, and those of a guest that can be reset."""
    with (
        Memory() as memory,
        Keeper([memory], more=" reboot=shutdown" if stops else "") as keeper,
        Destination.adopting(emulator(label), machine("tcg", incoming=False), keeper) as destination,
    ):
        destination.execute("set-action", {"reboot": "shutdown"})
        destination.execute("set-action", {"reboot": "reset", "panic": "none"})
        process = QemuProcess.open(destination.pid)
        found = actions(process)
        process.close()
        assert (found["reboot"], found["panic"]) == ("shutdown" if stops else "reset", "none")
        host_reset(destination)
        if stops:
            status, lines = destination.exited()
            assert (status, len(lines)) == (0, 1)
            assert "set-action: reboot=reset means shutdown in this QEMU" in lines[0]
            return
        assert destination.execute("query-status")["status"] == "prelaunch"
