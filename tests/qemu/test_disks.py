"""
Disks of a guest that were changed while it ran: it has the same ones after a hop, or the hop is refused.

The guest's own view of a disk is what ``qemu-io`` reads through its device.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from sevhop.engine import transfer
from sevhop.errors import Refused, RolledBack
from sevhop_qmp.errors import CommandError
from sevhop_qmp.monitor import Monitor

from tests.support.guests.running import Guest, wait_until

from .conftest import DescribeCounter, StartGuest
from .hops import HopDriver, ObservedHop, assert_unharmed, followed_by, hop, kill_destination, observe_commands, sevhop

MIB = 1 << 20


def image(path: Path, form: str = "qcow2", size: str = "16M") -> Path:
    """Make an image."""
    subprocess.run(["qemu-img", "create", "-q", "-f", form, path, size], check=True)
    return path


def disk(guest: Guest, name: str = "") -> dict[str, Any]:
    """The row of a drive in query-block, by a part of its device; of the virtio disk without."""
    (row,) = (row for row in guest.execute("query-block") if (name or "virtio-backend") in row.get("qdev", ""))
    assert isinstance(row, dict)
    return row


def io(guest: Guest, command: str, name: str = "") -> str:
    """Read or write as the guest does. :return: QEMU's output."""
    row, before = disk(guest, name), len(guest.said())
    guest.execute("human-monitor-command", command_line=f'qemu-io -d {row["qdev"]} "{command}"')
    return guest.said()[before:]


def write(guest: Guest, pattern: int, name: str = "") -> None:
    assert "wrote" in io(guest, f"write -P {pattern} 0 64k", name)


def reads(guest: Guest, pattern: int, name: str = "") -> bool:
    """Whether the guest reads a pattern at the beginning of its disk."""
    output = io(guest, f"read -P {pattern} 0 64k", name)
    assert "read 65536" in output
    return "verification failed" not in output


def files(guest: Guest) -> set[str]:
    """The images in the drives."""
    return {Path(row["inserted"]["file"]).name for row in guest.execute("query-block") if row.get("inserted")}


def locked(path: Path, form: str = "qcow2") -> bool:
    """Whether another program cannot write to an image."""
    done = subprocess.run(["qemu-io", "-f", form, "-c", "write -P 7 8M 4k", path], capture_output=True, check=False)
    return done.returncode != 0


# -- carried over ----------------------------------------------------------------------------------


def snapshot(guest: Guest) -> None:
    path = guest.machine.directory / "overlay.qcow2"
    guest.execute("blockdev-snapshot-sync", node_name="disk", snapshot_file=str(path), snapshot_node_name="overlay")


def added_snapshot(guest: Guest) -> None:
    """As libvirt does: the nodes are added, then the snapshot is taken."""
    path = image(guest.machine.directory / "overlay.qcow2")
    guest.execute("blockdev-add", driver="file", node_name="overlay-file", filename=str(path), discard="unmap")
    guest.execute("blockdev-add", driver="qcow2", node_name="overlay", file="overlay-file", backing=None)
    guest.execute("blockdev-snapshot", node="disk", overlay="overlay")


def committed_snapshot(guest: Guest) -> None:
    """A snapshot of a snapshot, of which the lower one is merged into the disk."""
    added_snapshot(guest)
    write(guest, 0x22)
    top = guest.machine.directory / "top.qcow2"
    guest.execute("blockdev-snapshot-sync", node_name="overlay", snapshot_file=str(top), snapshot_node_name="top")
    guest.execute("block-commit", job_id="merge", device="top", top_node="overlay", base_node="disk")
    wait_until(lambda: not guest.execute("query-block-jobs"), 30, "merged")


def merged_snapshot(guest: Guest) -> None:
    """A snapshot that was merged into the disk that the guest uses again; its node still exists, on top of it."""
    added_snapshot(guest)
    write(guest, 0x22)
    guest.execute("block-commit", job_id="merge", device="overlay")
    wait_until(lambda: any(job["ready"] for job in guest.execute("query-block-jobs")), 30, "all but merged")
    guest.execute("block-job-complete", device="merge")
    wait_until(lambda: not guest.execute("query-block-jobs"), 30, "merged")


def moved(guest: Guest) -> None:
    path = guest.machine.directory / "moved.qcow2"
    guest.execute("drive-mirror", job_id="move", device="disk", target=str(path), sync="full", format="qcow2")
    wait_until(lambda: bool(guest.execute("query-block-jobs")[0]["ready"]), 30, "mirrored")
    guest.execute("block-job-complete", device="move")
    wait_until(lambda: not guest.execute("query-block-jobs"), 30, "pivoted")


@pytest.mark.parametrize("live", [snapshot, added_snapshot, committed_snapshot, merged_snapshot, moved])
def test_disk_keeps_its_content_after_a_live_change(
    live: Callable[[Guest], None], old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    guest = start(counter_machine(disk_mib=16), old)
    guest.wait_for_ticks(3)
    write(guest, 0x11)
    live(guest)
    write(guest, 0xAA)
    before = files(guest)
    for number, emulator in enumerate((new, old)):
        hop(guest, emulator)
        assert files(guest) == before
        assert reads(guest, 0xAA + number)
        write(guest, 0xAB + number)
    assert_unharmed(guest)


@pytest.mark.parametrize("rolled_back", [False, True])
def test_unused_node_is_given_up_when_the_guest_has_stopped(
    rolled_back: bool,
    old: Path,
    new: Path,
    counter_machine: DescribeCounter,
    start: StartGuest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """QEMU gives up all nodes below one as well, and aborts when its guest writes to these."""
    guest = start(counter_machine(disk_mib=16), old)
    path = image(guest.machine.directory / "apart.qcow2")
    guest.execute("blockdev-add", driver="qcow2", node_name="apart", file={"driver": "file", "filename": str(path)})
    merged_snapshot(guest)
    hop(guest, new)
    commands: list[str] = []
    observe_commands(monkeypatch, lambda command, _: commands.append(command))
    if rolled_back:
        with pytest.raises(RolledBack):
            HopDriver().run(guest, old, at="load", fault=kill_destination)
        assert all(node["active"] for node in guest.execute("query-named-block-nodes"))
        write(guest, 0x33)
    hop(guest, old)
    assert "blockdev-set-active" not in commands[: commands.index("stop")]
    write(guest, 0x44)
    hop(guest, new)
    assert reads(guest, 0x44)
    assert_unharmed(guest)


def test_legacy_drive_keeps_its_name_and_content_after_a_snapshot(
    tmp_path: Path, old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    path = image(tmp_path / "a,b.raw", "raw")
    name = str(path).replace(",", ",,")
    more = ("-drive", f"if=none,id=d0,file={name},format=raw,cache=none", "-device", "virtio-blk-pci,drive=d0,id=v0")
    guest = start(counter_machine(more=more), old)
    write(guest, 0x11)
    guest.execute("blockdev-snapshot-sync", device="d0", snapshot_file=str(tmp_path / "overlay.qcow2"), format="qcow2")
    write(guest, 0xAA)
    for emulator in (new, old):
        hop(guest, emulator)
        assert disk(guest)["device"] == "d0"
        assert disk(guest)["inserted"]["cache"]["direct"]
        assert disk(guest)["inserted"]["backing_file_depth"] == 1
        assert reads(guest, 0xAA)
    assert_unharmed(guest)


CD = {
    "drive": (
        *("-drive", "if=none,id=cd,media=cdrom,readonly=on,format=raw,file={}"),
        *("-device", "ide-cd,drive=cd,id=cd0"),
    ),
    "blockdev": (
        *("-blockdev", "driver=file,node-name=first,filename={},read-only=on"),
        *("-device", "ide-cd,drive=first,id=cd0"),
    ),
}


@pytest.mark.parametrize("form", CD)
def test_drive_keeps_its_changed_medium(
    form: str, tmp_path: Path, old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    first, second = image(tmp_path / "first.iso", "raw"), image(tmp_path / "second.iso", "raw")
    guest = start(counter_machine(more=tuple(argument.format(first) for argument in CD[form])), old)
    guest.execute("blockdev-change-medium", id="cd0", filename=str(second), format="raw")
    for emulator in (new, old, new):
        hop(guest, emulator)
        assert files(guest) == {"second.iso"}
    assert all(node["active"] for node in guest.execute("query-named-block-nodes"))
    hop(guest, old)
    guest.execute("eject", id="cd0", force=True)
    hop(guest, new)
    assert files(guest) == set()
    guest.execute("blockdev-change-medium", id="cd0", filename=str(first), format="raw")
    hop(guest, old)
    assert files(guest) == {"first.iso"}
    assert_unharmed(guest)


def test_plugged_and_unplugged_disks_are_kept(
    tmp_path: Path, old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    more = (
        *("-device", "pcie-root-port,id=slot1,chassis=1", "-device", "virtio-scsi-pci,id=scsi"),
        *("-blockdev", f"driver=file,node-name=gone,filename={image(tmp_path / 'gone.raw', 'raw')}"),
        *("-device", "scsi-hd,drive=gone,id=first"),
        *("-device", "virtio-rng-pci,id=entropy"),
    )
    guest = start(counter_machine(more=more), old)
    guest.wait_for_ticks(3)
    guest.execute("device_del", id="first")
    wait_until(lambda: guest.execute("query-block") == [], 30, "unplugged")
    guest.execute("blockdev-del", node_name="gone")
    path = image(tmp_path / "plugged.qcow2")
    guest.execute("blockdev-add", driver="file", node_name="plugged-file", filename=str(path))
    guest.execute("blockdev-add", driver="qcow2", node_name="plugged", file="plugged-file")
    guest.execute("device_add", driver="virtio-blk-pci", drive="plugged", id="second", bus="slot1", serial="S1")
    write(guest, 0xAA)
    for emulator in (new, old):
        hop(guest, emulator)
        assert files(guest) == {"plugged.qcow2"}
        assert guest.execute("qom-get", path="/machine/peripheral/second", property="serial") == "S1"
        assert reads(guest, 0xAA)
        assert not locked(tmp_path / "gone.raw", "raw")
    assert_unharmed(guest)


def test_devices_that_were_plugged_into_a_newer_qemu_are_kept(
    tmp_path: Path, old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    """It reports properties that the older one does not know, and that the machine type has set for compatibility."""
    more = ("-device", "pcie-root-port,id=slot1,chassis=1", "-device", "virtio-scsi-pci,id=scsi")
    guest = start(counter_machine(more=more), new)
    path = image(tmp_path / "plugged.raw", "raw")
    guest.execute("blockdev-add", driver="file", node_name="plugged", filename=str(path))
    guest.execute("device_add", driver="scsi-hd", drive="plugged", id="second", bus="scsi.0", serial="S1")
    guest.execute("device_add", driver="virtio-rng-pci", id="entropy", bus="slot1")
    write(guest, 0xAA, "second")
    for emulator in (old, new):
        hop(guest, emulator)
        assert guest.execute("qom-get", path="/machine/peripheral/second", property="serial") == "S1"
        assert reads(guest, 0xAA, "second")
    assert_unharmed(guest)


# -- refused: disks that cannot be handed over --------------------------------------------------------


def refused(guest: Guest, new: Path) -> str:
    """A hop that is refused, as well as its check. :return: the reason."""
    pid = guest.pid
    driver = HopDriver()
    with pytest.raises(Refused) as caught:
        driver.run(guest, new)
    assert "stop" not in driver.phases
    assert guest.pid == pid
    assert sevhop("check", "--qmp", guest.machine.monitor, "--emulator", new).returncode == 1
    return str(caught.value)


def test_image_that_was_replaced_is_refused(
    tmp_path: Path, old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    guest = start(counter_machine(disk_mib=16), old)
    write(guest, 0x11)
    shutil.copyfile(guest.machine.disk, tmp_path / "restored")
    os.rename(tmp_path / "restored", guest.machine.disk)
    assert f"disk disk: {guest.machine.disk} is not the file that the guest has open" in refused(guest, new)
    assert reads(guest, 0x11)


def test_images_whose_names_were_swapped_are_refused(
    tmp_path: Path, old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    more = []
    for name in ("one", "two"):
        more += ["-blockdev", f"driver=file,node-name={name},filename={image(tmp_path / name, 'raw')}"]
        more += ["-device", f"virtio-blk-pci,drive={name},id={name}-disk"]
    guest = start(counter_machine(more=tuple(more)), old)
    write(guest, 0x11, "one-disk")
    os.rename(tmp_path / "one", tmp_path / "three")
    os.rename(tmp_path / "two", tmp_path / "one")
    os.rename(tmp_path / "three", tmp_path / "two")
    assert "is not the file that the guest has open" in refused(guest, new)
    assert reads(guest, 0x11, "one-disk")


@pytest.mark.parametrize("form", ["snapshot=yes", "snapshot=true", "-readconfig"])
def test_temporary_snapshot_is_refused(
    form: str, tmp_path: Path, old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    path = image(tmp_path / "disk.qcow2")
    if form == "-readconfig":
        config = tmp_path / "guest.cfg"
        config.write_text(f'[drive "d0"]\n if = "none"\n file = "{path}"\n format = "qcow2"\n snapshot = "on"\n')
        more = ("-readconfig", str(config))
    else:
        more = ("-drive", f"if=none,id=d0,file={path},format=qcow2,{form}")
    guest = start(counter_machine(more=(*more, "-device", "virtio-blk-pci,drive=d0")), old)
    write(guest, 0x11)
    reason = refused(guest, new)
    assert "disk d0" in reason
    assert "temporary snapshot" in reason
    assert reads(guest, 0x11)


@pytest.mark.parametrize("locking", ["", ",locking=off"])
def test_exported_disk_is_refused(
    locking: str, tmp_path: Path, old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    path = image(tmp_path / "second.raw", "raw")
    more = ("-blockdev", f"driver=file,node-name=second,filename={path}{locking}")
    guest = start(counter_machine(more=(*more, "-device", "virtio-blk-pci,drive=second,share-rw=on")), new)
    guest.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(tmp_path / "nbd")}})
    guest.execute("block-export-add", type="nbd", id="backup", node_name="second", writable=True)
    assert "an export (backup)" in refused(guest, old)
    assert_unharmed(guest, 3)


# -- rolled back: changes while a hop is prepared ------------------------------------------------------


def on(path: Path, *commands: tuple[str, Mapping[str, object]]) -> Callable[..., None]:
    """Commands on another monitor, during a hop."""

    async def run() -> None:
        async with await Monitor.connect(path) as monitor:
            for command, arguments in commands:
                await monitor.execute(command, arguments)

    def fault(*_: object) -> None:
        thread = threading.Thread(target=lambda: asyncio.run(run()))
        thread.start()
        thread.join()

    return fault


def after_the_last_check(monkeypatch: pytest.MonkeyPatch, act: Callable[..., None]) -> None:
    """A change after the last check of the hop, and before it stops the guest."""
    monkeypatch.setattr(transfer, "verify_unchanged", followed_by(transfer.verify_unchanged, act))


def with_second_monitor(tmp_path: Path) -> tuple[Path, tuple[str, ...]]:
    second = tmp_path / "second.sock"
    return second, ("-qmp", f"unix:{second},server=on,wait=off")


@pytest.fixture
def second(tmp_path: Path) -> Path:
    """The second monitor of ``guest``, for another client."""
    return with_second_monitor(tmp_path)[0]


@pytest.fixture
def guest(tmp_path: Path, old: Path, counter_machine: DescribeCounter, start: StartGuest) -> Guest:
    """A guest in the older QEMU, with a disk and a second monitor."""
    return start(counter_machine(disk_mib=16, more=with_second_monitor(tmp_path)[1]), old)


@pytest.mark.parametrize("phase", ["prepare", "stop"])
def test_snapshot_while_a_hop_is_prepared_rolls_back(
    phase: str, guest: Guest, second: Path, new: Path, tmp_path: Path
) -> None:
    arguments = {"node-name": "disk", "snapshot-file": str(tmp_path / "overlay"), "snapshot-node-name": "overlay"}
    with pytest.raises((Refused, RolledBack), match=r"disk disk|overlay"):
        HopDriver().run(guest, new, at=phase, fault=on(second, ("blockdev-snapshot-sync", arguments)))
    assert files(guest) == {"overlay"}
    hop(guest, new)
    assert files(guest) == {"overlay"}
    assert_unharmed(guest)


@pytest.mark.parametrize("paused", [True, False])
@pytest.mark.parametrize("phase", ["map", "save", "load"])
def test_guest_that_is_resumed_during_a_hop_keeps_its_disks(
    phase: str,
    paused: bool,
    tmp_path: Path,
    old: Path,
    new: Path,
    counter_machine: DescribeCounter,
    start: StartGuest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A QEMU whose guest writes to an image that it has given up aborts."""
    second, more = with_second_monitor(tmp_path)
    guest = start(counter_machine(disk_mib=16, more=more), new)
    merged_snapshot(guest)
    if paused:
        guest.execute("stop")
    commands: list[object] = []
    with monkeypatch.context() as patch:
        observe_commands(patch, lambda command, arguments: commands.append((command, arguments.get("active"))))
        with pytest.raises(RolledBack, match="another client has resumed the guest"):
            HopDriver().run(guest, old, at=phase, fault=on(second, ("cont", {})))
    assert ("blockdev-set-active", False) not in commands
    assert guest.execute("query-status")["running"]
    write(guest, 0x33)
    hop(guest, old)
    assert reads(guest, 0x33)
    assert_unharmed(guest)


def test_throttle_while_a_hop_is_prepared_rolls_back(guest: Guest, second: Path, new: Path) -> None:
    """Settings are carried over when the destination has been started, and verified before the guest stops."""
    limits = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops_rd", "iops_wr"), 0)
    arguments = {"id": disk(guest)["qdev"], "iops": 4711, **limits}
    with pytest.raises(RolledBack, match=r"the throttling of the guest was changed"):
        HopDriver().run(guest, new, at="stop", fault=on(second, ("block_set_io_throttle", arguments)))
    hop(guest, new)
    assert disk(guest)["inserted"]["iops"] == 4711
    assert_unharmed(guest)


def test_snapshot_after_the_last_check_rolls_back(
    guest: Guest, second: Path, new: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """QEMU is not queried any more, but the files that the process has open are compared."""
    pid = guest.pid
    arguments = {"node-name": "disk", "snapshot-file": str(tmp_path / "overlay"), "snapshot-node-name": "overlay"}

    after_the_last_check(monkeypatch, on(second, ("blockdev-snapshot-sync", arguments)))
    with pytest.raises(RolledBack, match="overlay was changed by another client"):
        HopDriver().run(guest, new)
    assert guest.pid == pid
    assert files(guest) == {"overlay"}
    assert_unharmed(guest)


def test_block_job_while_a_hop_is_prepared_rolls_back(guest: Guest, second: Path, new: Path, tmp_path: Path) -> None:
    target: dict[str, object] = {"job-id": "move", "device": "disk", "target": str(tmp_path / "copy"), "sync": "full"}
    with pytest.raises(RolledBack, match="job"):
        HopDriver().run(guest, new, at="stop", fault=on(second, ("drive-mirror", target)))
    assert [job["id"] for job in guest.execute("query-jobs")] == ["move"]
    assert_unharmed(guest)


@pytest.mark.parametrize("locking", ["", ",locking=off"])
@pytest.mark.parametrize("version", ["old", "new"])
def test_disk_that_the_source_does_not_give_up_rolls_back(
    locking: str,
    version: str,
    tmp_path: Path,
    old: Path,
    new: Path,
    counter_machine: DescribeCounter,
    start: StartGuest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An export is added after the last check. QEMU 7.2 fails to save then, QEMU 10 reports no error."""
    ours, other = (old, new) if version == "old" else (new, old)
    second, more = with_second_monitor(tmp_path)
    path = image(tmp_path / "second.raw", "raw")
    more += ("-blockdev", f"driver=file,node-name=second,filename={path}{locking}")
    guest = start(counter_machine(more=(*more, "-device", "virtio-blk-pci,drive=second,share-rw=on")), ours)
    guest.wait_for_ticks(3)
    pid = guest.pid
    address = {"type": "unix", "data": {"path": str(tmp_path / "nbd")}}
    export = {"type": "nbd", "id": "backup", "node-name": "second", "writable": True}

    export_it = on(second, ("nbd-server-start", {"addr": address}), ("block-export-add", export))
    after_the_last_check(monkeypatch, export_it)
    reason = "has not released disk second" if version == "new" else "cannot save the device state of the old QEMU"
    with pytest.raises(RolledBack, match=reason):
        HopDriver().run(guest, other)
    assert guest.pid == pid
    assert_unharmed(guest)


@pytest.mark.parametrize("late", [False, True])
def test_guest_that_another_client_stops_stays_stopped(
    late: bool, guest: Guest, second: Path, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also right before the hop stops it, when its state is saved and its images are given up all the same."""
    guest.wait_for_ticks(3)
    pid = guest.pid
    stop = on(second, ("stop", {}))

    async def stop_and_wait(*arguments: Any) -> None:
        await verify(*arguments)
        stop()
        await asyncio.sleep(0.1)  # our own monitor has received the event

    verify = transfer.verify_unchanged
    if late:
        monkeypatch.setattr(transfer, "verify_unchanged", stop_and_wait)
    with pytest.raises(RolledBack, match="another client"):
        HopDriver().run(guest, new, at="" if late else "stop", fault=stop)
    assert guest.pid == pid
    assert guest.execute("query-status")["status"] == "paused"
    assert locked(guest.machine.disk)
    guest.execute("cont")
    assert_unharmed(guest)


# -- paused guests -----------------------------------------------------------------------------------


def snapshot_and_write(guest: Guest, name: str) -> None:
    """As a management program does with the disk of a paused guest: take a snapshot."""
    assert guest.execute("query-status")["status"] == "paused"
    assert locked(guest.machine.disk)
    guest.execute("blockdev-snapshot-internal-sync", device="disk", name=name)
    write(guest, 0x33)


def test_paused_guest_has_its_disks_after_hops(
    old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    guest = start(counter_machine(disk_mib=16), old)
    guest.wait_for_ticks(3)
    guest.execute("stop")
    for number, emulator in enumerate((new, new, old, old)):
        hop(guest, emulator)
        snapshot_and_write(guest, f"after hop {number}")
    guest.execute("cont")
    assert_unharmed(guest)


@pytest.mark.parametrize("version", ["old", "new"])
def test_paused_guest_has_its_disks_after_a_rollback(
    version: str, old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    ours, other = (old, new) if version == "old" else (new, old)
    guest = start(counter_machine(disk_mib=16), ours)
    guest.wait_for_ticks(3)
    guest.execute("stop")
    for name in ("first", "second"):
        with pytest.raises(RolledBack):
            HopDriver().run(guest, other, at="load", fault=kill_destination)
        snapshot_and_write(guest, name)
    hop(guest, other)
    snapshot_and_write(guest, "third")
    guest.execute("cont")
    assert_unharmed(guest)


# -- dirty bitmaps -----------------------------------------------------------------------------------


def bitmap(guest: Guest) -> dict[str, Any]:
    """The only bitmap of the disk."""
    (found,) = disk(guest)["inserted"]["dirty-bitmaps"]
    assert isinstance(found, dict)
    return found


@pytest.fixture
def recorded(old: Path, counter_machine: DescribeCounter, start: StartGuest) -> Guest:
    """A guest that has written something since its last backup."""
    guest = start(counter_machine(disk_mib=16), old)
    guest.wait_for_ticks(3)
    guest.execute("block-dirty-bitmap-add", node="disk", name="backup", persistent=True)
    write(guest, 0x11)
    assert bitmap(guest)["count"] == 65536
    return guest


def test_persistent_bitmap_keeps_recording(recorded: Guest, old: Path, new: Path) -> None:
    for number, emulator in enumerate((new, old), 2):
        hop(recorded, emulator)
        found = bitmap(recorded)
        assert (found["persistent"], found["recording"], found.get("inconsistent")) == (True, True, None)
        io(recorded, f"write -P 1 {number}M 64k")
        assert bitmap(recorded)["count"] == number * 65536
    assert_unharmed(recorded)


def interrupted(engine: ObservedHop) -> None:
    assert engine.interrupt()


def disk_is_locked(engine: ObservedHop) -> None:
    """Another process has the disk when the destination activates its images."""
    execute = engine.prepared.started.destination.monitor.execute

    async def and_lock(command: str, *arguments: Any, **named: Any) -> Any:
        if command != "cont":
            return await execute(command, *arguments, **named)
        raise CommandError("cont", 'Failed to get "write" lock')

    engine.prepared.started.destination.monitor.execute = and_lock  # type: ignore[method-assign]


def images_are_activated(engine: ObservedHop) -> None:
    """The destination activates its images, and then fails to run."""
    execute = engine.prepared.started.destination.monitor.execute

    async def take(command: str, *arguments: Any, **named: Any) -> Any:
        if command != "cont":
            return await execute(command, *arguments, **named)
        await execute("blockdev-set-active", {"active": True})
        raise CommandError("cont", "it does not")

    engine.prepared.started.destination.monitor.execute = take  # type: ignore[method-assign]


@pytest.mark.parametrize("fault", [interrupted, disk_is_locked, images_are_activated])
def test_persistent_bitmap_stays_usable_after_a_rollback(
    fault: Callable[[ObservedHop], None], recorded: Guest, new: Path
) -> None:
    pid = recorded.pid
    driver = HopDriver()
    with pytest.raises(RolledBack):
        driver.run(recorded, new, at="resume", fault=fault)
    assert driver.hop.report.notes == []
    assert recorded.pid == pid
    found = bitmap(recorded)
    assert (found["persistent"], found["count"], found.get("inconsistent")) == (True, 65536, None)
    assert_unharmed(recorded)


def test_bitmap_that_is_lost_is_reported(recorded: Guest, new: Path) -> None:
    """A destination that has activated the images is killed before it can give them up."""

    def kill(engine: ObservedHop) -> None:
        images_are_activated(engine)
        taking = engine.prepared.started.destination.monitor.execute

        async def take_and_die(command: str, *arguments: Any, **named: Any) -> Any:
            try:
                return await taking(command, *arguments, **named)
            except CommandError:
                kill_destination(engine)
                raise

        engine.prepared.started.destination.monitor.execute = take_and_die  # type: ignore[method-assign]

    driver = HopDriver()
    with pytest.raises(RolledBack):
        driver.run(recorded, new, at="resume", fault=kill)
    (note,) = driver.hop.report.notes
    assert "dirty bitmap backup of disk disk cannot be used any more" in note
    assert_unharmed(recorded)


def test_bitmap_that_is_in_no_image_is_refused(recorded: Guest, old: Path, new: Path) -> None:
    recorded.execute("block-dirty-bitmap-add", node="disk", name="passing")
    assert "the dirty bitmap passing is in no image" in refused(recorded, new)
    assert_unharmed(recorded)


# -- disks on a server -------------------------------------------------------------------------------


@pytest.mark.parametrize("clients", [1, 2])
def test_disk_of_an_nbd_server_needs_a_second_client(
    clients: int,
    tmp_path_factory: pytest.TempPathFactory,
    old: Path,
    new: Path,
    counter_machine: DescribeCounter,
    start: StartGuest,
) -> None:
    """A server of a single client, which is the default of qemu-nbd, keeps the second one waiting."""
    directory = tmp_path_factory.mktemp("server")
    path = directory / "nbd"
    more = ("-blockdev", f"driver=nbd,node-name=far,server.type=unix,server.path={path}")
    serve = ["qemu-nbd", "--persistent", f"--shared={clients}", "--format=raw", f"--socket={path}"]
    with subprocess.Popen([*serve, image(directory / "far.raw", "raw")], stderr=subprocess.DEVNULL) as server:
        try:
            wait_until(path.exists, 30, "the server listens")
            guest = start(counter_machine(more=(*more, "-device", "virtio-blk-pci,drive=far,id=disk1")), old)
            write(guest, 0x11)
            if clients == 1:
                with pytest.raises(RolledBack, match="disk disk1 is reached by nbd"):
                    HopDriver().run(guest, new, start_timeout=3)
            else:
                hop(guest, new)
            assert reads(guest, 0x11)
            assert_unharmed(guest)
        finally:
            server.terminate()
