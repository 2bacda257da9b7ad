"""Disks of a domain that were changed while it ran: an upgrade keeps them, or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.guests.daemon import Daemon, DomainGuest
from tests.support.guests.running import wait_until

from ..conftest import each_once
from .conftest import StartDomain
from .holding import PausedUpgrade

IMAGES = Path("/var/lib/libvirt/guests")


def io(guest: DomainGuest, device: str, command: str) -> str:
    """Read or write as the guest does. :return: QEMU's output in its log."""
    log = guest.daemon.root / f"var/log/libvirt/qemu/{guest.name}.log"
    before = len(log.read_text())
    of_device = "-d " if device.startswith("/") else ""
    guest.daemon.virsh("qemu-monitor-command", guest.name, "--hmp", f'qemu-io {of_device}{device} "{command}"')
    wait_until(lambda: " ops; " in log.read_text()[before:], 30, "QEMU logs what it has read")
    return log.read_text()[before:]


def execute(guest: DomainGuest, command: str, **arguments: object) -> Any:
    """Run a QMP command that libvirt does not know of."""
    named = {key.replace("_", "-"): value for key, value in arguments.items()}
    text = json.dumps({"execute": command, "arguments": named})
    answer = json.loads(guest.daemon.virsh("qemu-monitor-command", guest.name, text))
    assert "error" not in answer, answer
    return answer["return"]


def drive(guest: DomainGuest, alias: str = "virtio-disk0") -> dict[str, Any]:
    """The row of a drive in query-block."""
    (row,) = (row for row in execute(guest, "query-block") if alias in row["qdev"])
    assert isinstance(row, dict)
    return row


def test_disk_keeps_its_content_after_a_live_snapshot(daemon: Daemon, start: StartDomain, old: Path, new: Path) -> None:
    guest = start()
    guest.wait_for_ticks()
    overlay = IMAGES / f"{guest.name}.overlay"
    spec = f"vda,file={overlay}"
    daemon.virsh("snapshot-create-as", guest.name, "--disk-only", "--no-metadata", "--diskspec", spec)
    device = "/machine/peripheral/virtio-disk0/virtio-backend"
    assert "wrote" in io(guest, device, "write -P 0xaa 0 64k")
    for emulator in (new, old):
        report = daemon.upgrade(guest.name, "--emulator", emulator)
        assert report["outcome"] == "done", report
        assert drive(guest)["inserted"]["file"] == str(overlay)
        output = io(guest, device, "read -P 0xaa 0 64k")
        assert "verification failed" not in output, output
    guest.wait_for_ticks()


def test_temporary_snapshot_on_the_command_line_is_refused(
    daemon: Daemon, start: StartDomain, new: Path, tmp_path: Path
) -> None:
    raw = IMAGES / "raw.img"
    daemon.run("truncate", "-s", "4M", raw)
    daemon.run("chmod", "666", raw)
    disk = f"file={raw},format=raw,if=none,id=dx,snapshot=on"
    argv = ("-drive", disk, "-device", "virtio-blk-pci,drive=dx,addr=0x10")
    arguments = "".join(f"<q:arg value='{argument}'/>" for argument in argv)
    namespace = "http://libvirt.org/schemas/domain/qemu/1.0"
    guest = start(elements=f"<q:commandline xmlns:q='{namespace}'>{arguments}</q:commandline>")
    assert "wrote" in io(guest, "dx", "write -P 0x5a 0 64k")
    checked = daemon.sevhop("check", guest.name, "--emulator", new)
    assert checked.returncode == 1
    assert "disk dx" in checked.stdout
    report = daemon.upgrade(guest.name, "--emulator", new)
    assert (report["status"], report["outcome"]) == (1, "refused"), report
    assert "verification failed" not in io(guest, "dx", "read -P 0x5a 0 64k")


def test_disk_that_was_changed_without_libvirt_is_refused(daemon: Daemon, start: StartDomain, new: Path) -> None:
    """libvirt would start both emulators with the disk that is in its XML."""
    guest = start()
    guest.wait_for_ticks()
    node = drive(guest)["inserted"]["node-name"]
    overlay = IMAGES / f"{guest.name}.unknown"
    daemon.run("qemu-img", "create", "-q", "-f", "qcow2", overlay, "16M")
    daemon.run("chmod", "666", overlay)
    execute(guest, "blockdev-add", driver="file", node_name="over-file", filename=str(overlay))
    execute(guest, "blockdev-add", driver="qcow2", node_name="over", file="over-file", backing=None)
    execute(guest, "blockdev-snapshot", node=node, overlay="over")
    report = daemon.upgrade(guest.name, "--emulator", new)
    assert (report["status"], report["outcome"]) == (1, "refused"), report
    assert "libvirt does not know" in report["reason"]
    assert str(overlay) in drive(guest)["inserted"]["file"]
    guest.wait_for_ticks()


def test_snapshot_while_an_upgrade_is_prepared_rolls_back(
    daemon: Daemon, start: StartDomain, old: Path, new: Path
) -> None:
    guest = start()
    guest.wait_for_ticks()
    overlay = IMAGES / f"{guest.name}.overlay"
    with PausedUpgrade.at("stop", guest, new) as upgrade:
        spec = f"vda,file={overlay}"
        daemon.virsh("snapshot-create-as", guest.name, "--disk-only", "--no-metadata", "--diskspec", spec)
        report = upgrade.finish()
    assert (report["status"], report["outcome"]) == (3, "rolled-back"), report
    assert "was changed by another client" in report["reason"]
    guest.wait_for_ticks()
    assert daemon.upgrade(guest.name, "--emulator", new)["outcome"] == "done"
    assert drive(guest)["inserted"]["file"] == str(overlay)


@pytest.mark.parametrize(("version", "how"), each_once(["old", "new"], ["interrupted", "killed"]))
def test_paused_guest_has_its_disks_after_a_rollback(
    daemon: Daemon, start: StartDomain, old: Path, new: Path, how: str, version: str
) -> None:
    """Its images are given up when its state is saved, and it is not resumed."""
    ours, other = (old, new) if version == "old" else (new, old)
    guest = start(emulator=ours)
    guest.wait_for_ticks()
    daemon.virsh("suspend", guest.name)
    with PausedUpgrade.at("terminate", guest, other, "--no-transit") as upgrade:
        if how == "interrupted":
            upgrade.interrupt()
            assert upgrade.finish()["outcome"] == "rolled-back"
    if how == "killed":
        assert "runs in the old QEMU" in daemon.sevhop("recover").stdout
    assert guest.state == "paused"
    write = ("qemu-io", "-f", "qcow2", "-c", "write 0 64k", IMAGES / f"{guest.name}.qcow2")
    assert daemon.run(*write).returncode != 0, "its disk is locked"
    report = daemon.upgrade(guest.name, "--emulator", other)
    assert report["outcome"] == "done", report
    assert guest.state == "paused"
    assert daemon.run(*write).returncode != 0, "its disk is locked"
    daemon.virsh("managedsave", guest.name)
    daemon.virsh("start", guest.name)
    daemon.virsh("resume", guest.name)
    guest.wait_for_ticks()
