"""
A guest that is announced while it runs in another QEMU: what clients of the destination see, and what they ask for.

The destination is started as libvirt does it: paused, and waiting for a stream.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import EventListener
from sevhop_qmp import adopt, adopt_library, device_state, exported, saved_device_state
from sevhop_qmp.errors import CommandError
from sevhop_qmp.process import QemuProcess

from tests.support.guests import real_mode
from tests.support.guests.build import Unavailable
from tests.support.guests.machine import Q35, Accelerator
from tests.support.guests.running import wait_until

from .adopting import EVERY_EMULATOR, TIMEOUT, Destination, Keeper, Memory, machine, sev_guest, unread

HEADER = device_state.header(Q35)
ANNOUNCED = adopt.Announcement(announced=True, missing="")


@pytest.fixture(scope="module")
def firmware() -> tuple[str, str]:
    """
    A guest that runs in any memory, in flash: other firmware is a RAM block, which a hop copies and these tests do not.
    """
    try:
        return "-drive", f"if=pflash,format=raw,readonly=on,file={real_mode.firmware()}"
    except Unavailable as err:
        pytest.skip(f"the guest cannot be built: {err}")


def disk(path: Path, device: str = "virtio-blk-pci") -> tuple[str, ...]:
    """A disk that one QEMU can use at a time."""
    node = f"file,node-name=disk,filename={path},locking=on"
    return "-blockdev", node, "-device", f"{device},drive=disk"


def state_of(source: Destination, path: Path) -> bytes:
    """The stream with the state of a QEMU, which gives up its disks."""
    source.execute("xen-save-devices-state", {"filename": str(path), "live": True})
    return saved_device_state.complete(path.read_bytes(), HEADER)


@dataclass
class Waiting:
    """A destination that waits for its state, and the pipe for it."""

    destination: Destination
    writer: FileIO
    events: EventListener

    def load(self, state: bytes, *events: str) -> None:
        """Write the state, and wait until it has been loaded: events, and the end of the migration, a second time."""
        assert state.startswith(HEADER)
        self.writer.write(state[len(HEADER) :])
        self.writer.close()
        self.see(*events, "completed")

    def see(self, *expected: str) -> None:
        """The next events: a name, or a status of MIGRATION."""
        for name in expected:
            event = self.destination.next_event(self.events)
            assert name in (event["event"], status(event)), event

    def query(self) -> tuple[str, bool]:
        """What clients are informed of."""
        answer = self.destination.execute("query-status")
        return answer["status"], answer["running"]


def status(event: Any) -> str:
    return str(event.get("data", {}).get("status", ""))


@contextmanager
def waiting(destination: Destination) -> Iterator[Waiting]:
    read_end, write_end = os.pipe()
    with (
        FileIO(read_end) as reader,
        FileIO(write_end, "wb") as writer,
        destination.events("MIGRATION", "RESUME", "STOP", "BALLOON_CHANGE", "DEVICE_TRAY_MOVED") as events,
    ):
        destination.adopt_ram_with(reader.fileno(), len(HEADER))
        names = ("events", "late-block-activate")
        capabilities = [{"capability": name, "state": True} for name in names]
        destination.execute("migrate-set-capabilities", {"capabilities": capabilities})
        destination.send_fd("incoming", reader.fileno())
        destination.execute("migrate-incoming", {"uri": "fd:incoming"})
        with pytest.raises(CommandError, match="The header of the stream has not been read"):
            destination.announce()
        writer.write(HEADER)
        wait_until(lambda: unread(reader.fileno()) == 0, TIMEOUT, "the header is read")
        while status(destination.next_event(events)) != "active":
            pass
        yield Waiting(destination, writer, events)


#: Starts, from a QEMU and options, a source, and an SEV destination that waits for its state, announced as running.
StartEncrypted = Callable[..., AbstractContextManager[tuple[Destination, Destination, Waiting]]]


@pytest.fixture
def encrypted(kvm: Accelerator, memory: Memory, fake_kernel: str, c_bit: int) -> StartEncrypted:
    @contextmanager
    def start(qemu: Path, *more: str) -> Iterator[tuple[Destination, Destination, Waiting]]:
        with (
            Destination([qemu, *machine(kvm, *more, incoming=False)], dict(os.environ)) as source,
            Keeper([memory], context="sev") as keeper,
            Destination.adopting(qemu, machine(kvm, *more, *sev_guest(c_bit)), keeper, fake_kernel) as destination,
            waiting(destination) as guest,
        ):
            destination.announce()
            destination.execute("cont")
            guest.see("completed", "RESUME")
            yield source, destination, guest

    return start


@EVERY_EMULATOR
def test_announced_guest_runs_when_its_state_has_been_loaded(
    qemu: Path, accelerator: Accelerator, keeper: Keeper, firmware: tuple[str, str], tmp_path: Path
) -> None:
    """Its disk is the source's until then, whatever clients do."""
    image = tmp_path / "disk"
    image.write_bytes(bytes(1 << 20))
    more = [*firmware, *disk(image)]
    with (
        Destination([qemu, *machine(accelerator, *more, incoming=False)], dict(os.environ)) as source,
        Destination.adopting(qemu, machine(accelerator, *more), keeper) as destination,
        waiting(destination) as guest,
    ):
        assert destination.status().announced == "none"
        assert destination.announce() == ANNOUNCED
        guest.see("completed")
        assert (guest.query(), destination.status().announced) == (("paused", False), "paused")
        destination.execute("cont")
        guest.see("RESUME")
        assert (guest.query(), destination.status().announced) == (("running", True), "running")
        destination.execute("cont")
        assert destination.announce() == ANNOUNCED
        assert guest.events.empty(), "clients are informed once"
        assert not destination.status().ran
        assert "run" not in keeper.requests

        guest.load(state_of(source, tmp_path / "state"), "RESUME")
        wait_until(lambda: "run" in keeper.requests, TIMEOUT, "the keeper is notified")
        assert guest.query() == ("running", True)
        assert destination.status().ran
        destination.execute("stop")
        guest.see("STOP")
        assert guest.query() == ("paused", False)
        destination.execute("cont")
        guest.see("RESUME")
        destination.finish()
        assert guest.query() == ("running", True)


@EVERY_EMULATOR
def test_announced_guest_is_paused_if_a_client_has_stopped_it(
    qemu: Path, accelerator: Accelerator, keeper: Keeper, firmware: tuple[str, str], tmp_path: Path
) -> None:
    with (
        Destination([qemu, *machine(accelerator, *firmware, incoming=False)], dict(os.environ)) as source,
        Destination.adopting(qemu, machine(accelerator, *firmware), keeper) as destination,
        waiting(destination) as guest,
    ):
        destination.announce()
        destination.execute("cont")
        guest.see("completed", "RESUME")
        destination.execute("stop")
        guest.see("STOP")
        destination.execute("stop")
        assert guest.events.empty()
        assert (guest.query(), destination.status().announced) == (("paused", False), "paused")

        guest.load(state_of(source, tmp_path / "state"))
        assert guest.query() == ("paused", False)
        assert not destination.status().ran
        assert "run" not in keeper.requests
        destination.execute("cont")
        guest.see("RESUME")
        assert destination.status().ran


@EVERY_EMULATOR
def test_announced_sev_guest_runs_with_the_move(
    qemu: Path, encrypted: StartEncrypted, vm: int, firmware: tuple[str, str], tmp_path: Path
) -> None:
    """Not when its state has been loaded; what clients ask for until the move is remembered."""
    with encrypted(qemu, *firmware) as (source, destination, guest):
        guest.load(state_of(source, tmp_path / "state"))
        assert guest.query() == ("running", True)
        destination.execute("stop")
        destination.execute("cont")
        guest.see("STOP", "RESUME")
        assert not destination.status().ran

        assert destination.move_from(vm).errno == 0
        assert destination.status().ran
        guest.see("RESUME")
        assert guest.query() == ("running", True)


@EVERY_EMULATOR
def test_announced_sev_guest_stays_paused_after_the_move_if_a_client_has_stopped_it(
    qemu: Path, encrypted: StartEncrypted, vm: int, firmware: tuple[str, str], tmp_path: Path
) -> None:
    with encrypted(qemu, *firmware) as (source, destination, guest):
        guest.load(state_of(source, tmp_path / "state"))
        destination.execute("stop")
        guest.see("STOP")
        assert destination.move_from(vm).errno == 0
        assert guest.query() == ("paused", False)
        assert not destination.status().ran
        destination.execute("cont")
        guest.see("RESUME")
        assert destination.status().ran


@EVERY_EMULATOR
def test_context_is_not_moved_to_a_guest_whose_disk_another_process_uses(
    qemu: Path, encrypted: StartEncrypted, vm: int, firmware: tuple[str, str], tmp_path: Path
) -> None:
    """After the move there is no way back."""
    image = tmp_path / "disk"
    image.write_bytes(bytes(1 << 20))
    # Not a virtio device, whose state depends on whether the guest is encrypted.
    more = [*firmware, *disk(image, "ide-hd")]
    with encrypted(qemu, *more) as (source, destination, guest):
        guest.load(state_of(source, tmp_path / "state"))
        source.execute("cont")
        with pytest.raises(CommandError, match="The disk images cannot be activated"):
            destination.move_from(vm)
        assert (destination.status().moved, destination.status().ran) == (False, False)
        assert source.execute("query-status")["running"]


def test_qemu_reports_that_its_context_was_moved_away(
    qemu: Path,
    kvm: Accelerator,
    memory: Memory,
    fake_kernel: str,
    c_bit: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAKE_SEV_DEAD", str(tmp_path / "moved"))
    with (
        Keeper([memory], context="sev") as keeper,
        Destination.adopting(qemu, machine(kvm, *sev_guest(c_bit)), keeper, fake_kernel) as destination,
    ):
        assert not destination.status().vm_dead
        (tmp_path / "moved").touch()
        assert destination.status().vm_dead


@EVERY_EMULATOR
def test_clients_see_balloon_and_trays_of_the_guest_when_the_hop_is_over(
    qemu: Path, accelerator: Accelerator, keeper: Keeper, tmp_path: Path
) -> None:
    """They have asked before the state was loaded."""
    ballooned = 256 * 4096
    devices = [
        *["-device", "virtio-balloon-pci-transitional,id=balloon,addr=5"],
        *["-device", "ide-cd,id=open,bus=ide.0", "-device", "ide-cd,id=closed,bus=ide.1"],
    ]
    command = machine(accelerator, *devices)
    with (
        Destination([qemu, *machine(accelerator, *devices, incoming=False)], dict(os.environ)) as source,
        Destination.adopting(qemu, command, keeper) as destination,
        waiting(destination) as guest,
    ):
        # As a driver: the I/O window at 0xc000 (register 0x10), enabled (4); "actual" is at 24 there, in pages.
        for line in ("/w 0xcf8 0x80002810", "/w 0xcfc 0xc001", "/w 0xcf8 0x80002804", "/h 0xcfc 1", "/w 0xc018 256"):
            source.hmp(f"o {line}")
        source.execute("blockdev-open-tray", {"id": "open"})
        destination.announce()
        guest.see("completed")
        before = destination.execute("query-balloon")["actual"]
        guest.load(state_of(source, tmp_path / "state"))
        assert guest.events.empty()
        destination.finish()
        changed, moved = destination.next_event(guest.events), destination.next_event(guest.events)
        assert (changed["event"], changed["data"]) == ("BALLOON_CHANGE", {"actual": before - ballooned})
        assert (moved["event"], moved["data"]) == (
            "DEVICE_TRAY_MOVED",
            {"device": "", "id": "open", "tray-open": True},
        )
        destination.finish()
        assert guest.events.empty()


def test_guest_that_is_not_expected_is_not_announced(qemu: Path, accelerator: Accelerator, keeper: Keeper) -> None:
    environment = {**os.environ, **adopt_library.preloading({})}
    with (
        Destination([qemu, *machine(accelerator)], environment) as plain,
        pytest.raises(CommandError, match="No hop is in progress"),
    ):
        plain.announce()
    with (
        Destination.adopting(qemu, machine(accelerator, incoming=False), keeper) as destination,
        pytest.raises(CommandError, match="This QEMU does not wait for a stream"),
    ):
        destination.announce()


@EVERY_EMULATOR
@pytest.mark.parametrize("missing", ["stop", "inmigrate"])
def test_announcement_reports_what_a_qemu_lacks(
    qemu: Path, accelerator: Accelerator, keeper: Keeper, missing: str
) -> None:
    with Destination.adopting(qemu, machine(accelerator), keeper) as destination, waiting(destination) as guest:
        remove(destination, missing)
        assert destination.announce() == adopt.Announcement(announced=False, missing=missing)
        assert destination.status().announced == "none"
        assert guest.events.empty()
        if missing == "stop":
            assert guest.query()[0] == "inmigrate"


def remove(destination: Destination, what: str) -> None:
    """Make a QEMU one with another command "stop" than is known, or without a run state."""
    process = QemuProcess.open(destination.pid)
    try:
        found = exported.addresses(process, ("RunState_lookup", "qmp_marshal_stop", "qmp_marshal_cont"))
        with process.memory(write=True) as memory:
            if what == "inmigrate":
                # struct QEnumLookup: names, features, and how many they are.
                os.pwrite(memory, bytes(4), found["RunState_lookup"] + 16)
                return
            stop, cont = (found[f"qmp_marshal_{name}"].to_bytes(8, "little") for name in ("stop", "cont"))
            heap = next(mapping for mapping in process.mappings() if mapping.path == "[heap]")
            offset = os.pread(memory, heap.end - heap.start, heap.start).index(stop)
            os.pwrite(memory, cont, heap.start + offset)
    finally:
        process.close()
