"""What was set in a domain's QEMU besides its XML, or is generated at each start: kept, refused, or noted."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.support.guests.daemon import Daemon, DomainGuest
from tests.support.guests.running import wait_until

from .conftest import StartDomain
from .holding import PausedUpgrade

VNC = "<graphics type='vnc' autoport='yes'/><video><model type='vga'/></video>"
LIMITS = {"bps": 1 << 20, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 200, "iops_wr": 0, "iops_rd_max": 300}


def monitor(guest: DomainGuest, command: str, **arguments: object) -> Any:
    """Run a QMP command that libvirt does not know of."""
    request = json.dumps({"execute": command, "arguments": arguments})
    answer = json.loads(guest.daemon.virsh("qemu-monitor-command", guest.name, request))
    assert "return" in answer, answer
    return answer["return"]


def settings(guest: DomainGuest) -> dict[str, Any]:
    """The settings, by QMP."""
    (disk,) = (row for row in monitor(guest, "query-block") if "virtio" in row["qdev"])
    nodes = monitor(guest, "query-named-block-nodes", flat=True)
    return {
        "limits": {name: value for name, value in disk["inserted"].items() if "iops" in name or "bps" in name},
        "thresholds": {(row["drv"], row["file"]): row["write_threshold"] for row in nodes},
        "polling": [row["poll-max-ns"] for row in monitor(guest, "query-iothreads")],
    }


def display(guest: DomainGuest) -> str:
    """The address of its display."""
    return guest.daemon.virsh("domdisplay", guest.name)


def autoport(guest: DomainGuest, *options: str) -> str:
    """The attribute in its XML."""
    found = ElementTree.fromstring(guest.xml(*options)).find("devices/graphics")
    assert found is not None
    return found.get("autoport", "")


@pytest.mark.parametrize("way", ["upgrade", "prepare and recover"])
def test_settings_are_set_in_the_new_qemu(daemon: Daemon, start: StartDomain, old: Path, new: Path, way: str) -> None:
    guest = start(elements="<iothreads>1</iothreads>")
    guest.wait_for_ticks(3)
    daemon.virsh("domblkthreshold", guest.name, "vda", "1M")
    daemon.virsh("iothreadset", guest.name, "1", "--poll-max-ns", "4711", "--live")
    (qdev,) = (row["qdev"] for row in monitor(guest, "query-block") if "virtio" in row["qdev"])
    monitor(guest, "block_set_io_throttle", id=qdev, **LIMITS)
    before = settings(guest)
    assert before["polling"] == [4711]
    for emulator in (new, old):
        if way == "upgrade":
            report = daemon.upgrade(guest.name, "--emulator", emulator)
            assert (report["outcome"], report["notes"]) == ("done", []), report
        else:
            assert daemon.upgrade(guest.name, "--emulator", emulator, "--prepare")["outcome"] == "prepared"
            done = daemon.recover_one(guest.name)
            assert (done["status"], done["result"], done["detail"]) == (0, "destination", ""), done
        assert settings(guest) == before
        guest.wait_for_ticks(3)


def test_display_keeps_its_port(daemon: Daemon, start: StartDomain, old: Path, new: Path) -> None:
    """A client that reconnects must find the same guest, and not one that has got the port meanwhile."""
    first = start(name="first", more=VNC)
    guest = start(name="second", more=VNC)
    guest.wait_for_ticks(3)
    before = display(guest)
    assert before != display(first)
    first.end()
    for emulator in (new, old):
        report = daemon.upgrade(guest.name, "--emulator", emulator)
        assert (report["outcome"], report["notes"]) == ("done", []), report
        assert display(guest) == before
        assert (autoport(guest), autoport(guest, "--inactive")) == ("no", "yes")
    # libvirt chooses it again when the domain is saved and restored without sevhop.
    daemon.virsh("save", guest.name, "/run/saved")
    daemon.virsh("restore", "/run/saved")
    assert display(guest) != before
    assert autoport(guest) == "yes"
    guest.wait_for_ticks(3)


def test_upgrade_rolls_back_if_a_forwarded_port_is_taken(
    daemon: Daemon, start: StartDomain, old: Path, new: Path
) -> None:
    guest = start(name="guest", more=VNC)
    guest.wait_for_ticks(3)
    before = display(guest)
    with PausedUpgrade.at("restore", guest, new) as upgrade:
        other = start(name="other", more=VNC)
        assert display(other) == before
        report = upgrade.finish()
    assert (report["status"], report["outcome"]) == (3, "rolled-back"), report
    (note,) = report["notes"]
    assert note.startswith("VNC display default listens at")
    assert guest.emulator() == str(old)
    assert display(guest) != before
    guest.wait_for_ticks(3)
    assert daemon.upgrade(guest.name, "--emulator", new)["outcome"] == "done"
    guest.wait_for_ticks(3)


@pytest.mark.parametrize("what", ["snapshot", "checkpoint"])
def test_transient_domain_with_snapshots_is_refused(daemon: Daemon, start: StartDomain, new: Path, what: str) -> None:
    guest = start(transient=True)
    guest.wait_for_ticks(3)
    if what == "snapshot":
        daemon.virsh("snapshot-create-as", guest.name, "one", "--disk-only")
    else:
        daemon.virsh("checkpoint-create-as", guest.name, "one")
    pid = guest.pid
    report = daemon.upgrade(guest.name, "--emulator", new)
    assert (report["status"], report["outcome"]) == (1, "refused"), report
    assert f"libvirt forgets its snapshots ({int(what == 'snapshot')}) and checkpoints" in report["reason"]
    assert daemon.virsh(f"{what}-list", guest.name, "--name") == "one"
    assert guest.pid == pid
    guest.wait_for_ticks(3)


def test_autodestroy_domain_is_refused(daemon: Daemon, start: StartDomain, new: Path) -> None:
    guest = start()
    daemon.virsh("destroy", guest.name)
    command = ["nsenter", "--mount", "--net", "--target", str(daemon.pid), "--", "virsh", "--connect", "qemu:///system"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as client:
        assert client.stdin is not None
        client.stdin.write(f"start --autodestroy {guest.name}\n")
        client.stdin.flush()
        wait_until(lambda: guest.state == "running", 60, "it runs")
        report = daemon.upgrade(guest.name, "--emulator", new)
        assert (report["status"], report["outcome"]) == (1, "refused"), report
        assert "destroys it when the client that started it disconnects" in report["reason"]
        assert "destroys it when the client" in daemon.sevhop("check", guest.name).stdout
        assert guest.state == "running"
    wait_until(lambda: guest.state == "shut off", 60, "libvirt destroys it with its client")


def test_new_vm_generation_id_is_noted(daemon: Daemon, start: StartDomain, new: Path) -> None:
    """libvirt sets a new one whenever it restores a domain."""
    guest = start(elements="<genid/>")
    guest.wait_for_ticks(3)
    before = monitor(guest, "query-vm-generation-id")["guid"]
    report = daemon.upgrade(guest.name, "--emulator", new)
    assert report["outcome"] == "done", report
    after = monitor(guest, "query-vm-generation-id")["guid"]
    assert after != before
    assert report["notes"] == [f"the VM generation ID is {after} in the new QEMU, {before} in the old QEMU"]
    guest.wait_for_ticks(3)


@pytest.mark.parametrize(
    ("options", "outcome"),
    [
        ([], "refused"),
        (["--no-transit"], "refused"),
        (["--no-transit", "--no-rehearsal"], "rolled-back"),
    ],
)
def test_lost_cpu_feature_is_refused_or_rolls_back(
    daemon: Daemon, start: StartDomain, old: Path, new: Path, options: list[str], outcome: str
) -> None:
    """TCG's ``max`` has pcommit in QEMU 7.2, and not in 10.0."""
    guest = start(accelerator="tcg", cpu="<cpu mode='maximum'/>")
    guest.wait_for_ticks(3)
    report = daemon.upgrade(guest.name, "--emulator", new, *options)
    assert report["outcome"] == outcome, report
    assert "the guest's processors would lose CPUID 7.0 EBX bit 22" in report["reason"]
    assert guest.emulator() == str(old)
    guest.wait_for_ticks(3)
