"""What was set in a QEMU since its start, by QMP alone: it is kept by a hop, or noted in its report."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
from typing import Any

import pytest
from sevhop.errors import Refused
from sevhop.guest import runtime_settings
from sevhop_qmp.process import QemuProcess

from tests.support.guests.running import Guest

from .conftest import DescribeCounter, StartGuest
from .hops import HopDriver

NOTHING = dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)


def set_by_qmp(guest: Guest, command: str, arguments: dict[str, Any]) -> Any:
    """For arguments with underscores in their names."""

    async def run() -> Any:
        async with await guest.monitor() as monitor:
            return await monitor.execute(command, arguments)

    return asyncio.run(run())


def settings(guest: Guest) -> dict[str, Any]:
    """The settings, read without the code under test."""
    disks = {}
    for row in guest.execute("query-block"):
        if inserted := row.get("inserted"):
            limits = {key: value for key, value in inserted.items() if "iops" in key or "bps" in key}
            disks[row.get("qdev") or row["device"]] = (limits, inserted.get("group"))
    process = QemuProcess.open(guest.pid)
    actions = runtime_settings.actions(process)
    process.close()
    balloon = "/machine/peripheral/balloon"
    usernet = guest.execute("human-monitor-command", command_line="info usernet").splitlines()
    return {
        "disks": disks,
        "thresholds": sorted(row["write_threshold"] for row in guest.execute("query-named-block-nodes")),
        "polling": [
            {key: value for key, value in row.items() if key != "thread-id"} for row in guest.execute("query-iothreads")
        ],
        "group": guest.execute("qom-get", path="/objects/group", property="limits"),
        "statistics": guest.execute("qom-get", path=balloon, property="guest-stats-polling-interval"),
        "identity": guest.execute("query-vm-generation-id"),
        "actions": actions,
        # Without the descriptor.
        "ports": sorted((line.split()[0], *line.split()[2:]) for line in usernet if "HOST_FORWARD" in line),
    }


def test_settings_are_set_in_the_new_qemu(
    old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest, tmp_path: Path
) -> None:
    image = tmp_path / "data.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "16M"], check=True)
    more = (
        *("-object", "iothread,id=io", "-object", "throttle-group,id=group,x-iops-total=10"),
        *("-netdev", "user,id=net,hostfwd=tcp:127.0.0.1:0-:1"),
        *("-device", "virtio-net-pci,netdev=net", "-device", "virtio-balloon-pci,id=balloon"),
        *("-device", "vmgenid,guid=auto,id=identity"),
        *("-drive", f"if=none,id=data,file={image},throttling.iops-total=70"),
        *("-device", "virtio-blk-pci,drive=data"),
    )
    guest = start(counter_machine(disk_mib=16, more=more), old)
    guest.wait_for_ticks(3)
    before = settings(guest)
    (disk,) = (name for name, (limits, _) in before["disks"].items() if "virtio" in name and not limits["iops"])
    limits = {**NOTHING, "iops": 100, "iops_max": 400, "iops_max_length": 3, "iops_size": 4096}
    set_by_qmp(guest, "block_set_io_throttle", {"id": disk, **limits, "group": "shared"})
    set_by_qmp(guest, "block_set_io_throttle", {"device": "data", **NOTHING})
    node = next(row["node-name"] for row in guest.execute("query-named-block-nodes") if row["drv"] == "qcow2")
    guest.execute("block-set-write-threshold", node_name=node, write_threshold=1 << 20)
    guest.execute("qom-set", path="/objects/io", property="poll-max-ns", value=4711)
    group = {**before["group"], "iops-total": 0, "bps-total": 1 << 20}
    guest.execute("qom-set", path="/objects/group", property="limits", value=group)
    guest.execute("qom-set", path="/machine/peripheral/balloon", property="guest-stats-polling-interval", value=7)
    guest.execute("set-action", panic="none", reboot="shutdown", shutdown="pause", watchdog="inject-nmi")
    assert set(settings(guest)["actions"].values()) == {"none", "shutdown", "pause", "inject-nmi"}
    (port,) = (row[2] for row in before["ports"])
    for line in (f"hostfwd_remove net tcp:127.0.0.1:{port}", "hostfwd_add net tcp:127.0.0.1:0-10.0.2.15:3"):
        guest.execute("human-monitor-command", command_line=line)
    changed = settings(guest)
    assert all(changed[name] != before[name] for name in changed if name != "identity")
    for emulator in (new, old):
        report = HopDriver().run(guest, emulator)
        assert (report.outcome, report.notes) == ("done", [])
        assert settings(guest) == changed
        guest.wait_for_ticks(3)


@pytest.mark.parametrize("password", [False, True])
def test_password_is_noted(
    password: bool, old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest, tmp_path: Path
) -> None:
    """It cannot be read."""
    option = f"unix:{tmp_path}/vnc" + ",password=on" * password
    guest = start(counter_machine(more=("-vnc", option)), old)
    guest.wait_for_ticks(3)
    if password:
        guest.execute("set_password", protocol="vnc", password="secret")
    report = HopDriver().run(guest, new)
    assert [note for note in report.notes if "the password of VNC display default" in note] == report.notes
    assert bool(report.notes) == password
    guest.wait_for_ticks(3)


def test_display_that_was_moved_is_refused(
    old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest, tmp_path: Path
) -> None:
    guest = start(counter_machine(more=("-vnc", f"unix:{tmp_path}/vnc")), old)
    guest.wait_for_ticks(3)
    pid = guest.pid
    guest.execute("display-update", type="vnc", addresses=[{"type": "unix", "path": f"{tmp_path}/moved"}])
    with pytest.raises(Refused, match=f"VNC display default listens at unix {tmp_path}/vnc in the new QEMU"):
        HopDriver().run(guest, new)
    assert guest.pid == pid
    guest.wait_for_ticks(3)


def test_added_objects_are_noted(old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest) -> None:
    guest = start(counter_machine(more=("-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net")), old)
    guest.wait_for_ticks(3)
    guest.execute("human-monitor-command", command_line="hostfwd_add net udp:127.0.0.1:0-10.0.2.16:4")
    guest.execute("object-add", qom_type="iothread", id="later")
    guest.execute("chardev-add", id="line", backend={"type": "null", "data": {}})
    report = HopDriver().run(guest, new)
    port, thread, line = report.notes
    assert "the forwarded port net udp:127.0.0.1:" in port  # the old QEMU still has it
    assert "object later (iothread) was added" in thread
    assert "character device line was added" in line
    guest.wait_for_ticks(3)


#: A feature that TCG's ``max`` has in QEMU 7.2, and not in 10.0.
_LOST = "pcommit"


def test_lost_cpu_feature_is_refused(old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest) -> None:
    guest = start(counter_machine(accelerator="tcg", cpu="max"), old)
    guest.wait_for_ticks(3)
    pid = guest.pid
    with pytest.raises(Refused, match=rf"would lose CPUID 7.0 EBX bit 22 \({_LOST}\)"):
        HopDriver().run(guest, new, timeout=60)
    assert guest.pid == pid
    guest.wait_for_ticks(3)


def test_gained_cpu_feature_is_noted(old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest) -> None:
    guest = start(counter_machine(accelerator="tcg", cpu=f"max,{_LOST}=off"), old)
    guest.wait_for_ticks(3)
    report = HopDriver().run(guest, new, timeout=60)
    (note,) = report.notes
    assert "gives the guest's processors more: " in note
    assert "CPUID 7.0 EBX bit 29" in note  # sha-ni
    guest.wait_for_ticks(3)
    with pytest.raises(Refused, match=r"would lose .*sha-ni"):
        HopDriver().run(guest, old, timeout=60)
    guest.wait_for_ticks(3)
