"""What a Linux guest still has after a hop besides its disk and network: its lines to the outside, and its watchdog."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from tests.support.guests.lines import Line
from tests.support.guests.running import Guest, wait_ended

from .conftest import DescribeCounter, DescribeLinux, StartGuest
from .hops import HopDriver, hop

#: Seconds that the guest's watchdog goes without food (linux_init.c).
WATCHDOG = 8.0


def pty(guest: Guest) -> Path:
    """The pty behind the chardev of that name; a QEMU opens one of its own."""
    (name,) = (row["filename"] for row in guest.execute("query-chardev") if row["label"] == "pty")
    return Path(name.removeprefix("pty:"))


def test_qxl_and_spice_survive_a_hop(
    tmp_path: Path, old: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    """Debian 12's QEMU has it, later ones have it in a package of their own."""
    spice = tmp_path / "spice.sock"
    words = ("-spice", f"unix=on,addr={spice},disable-ticketing=on", "-device", "qxl-vga")
    guest = start(counter_machine(more=words), old)
    guest.wait_for_ticks(5)
    hop(guest, old)
    guest.wait_for_ticks(5)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(spice))
    verdict = guest.stop()
    assert verdict.unharmed, verdict


def test_serial_lines_and_watchdog_work_after_hops(
    tmp_path: Path, old: Path, new: Path, linux_machine: DescribeLinux, start: StartGuest
) -> None:
    """A client may connect again. The watchdog does not expire because of a hop, and still works."""
    serial, channel = tmp_path / "line.sock", tmp_path / "channel.sock"
    more = (
        *("-chardev", f"socket,id=line,path={serial},server=on,wait=off", "-serial", "chardev:line"),
        *("-device", "virtio-serial-pci"),
        *("-chardev", f"socket,id=channel,path={channel},server=on,wait=off"),
        *("-device", "virtserialport,chardev=channel,name=org.example.channel"),
        *("-chardev", "pty,id=pty", "-device", "virtserialport,chardev=pty,name=org.example.pty"),
        *("-device", "i6300esb", "-watchdog-action", "poweroff", "-device", "pvpanic"),
        *("-blockdev", "driver=null-co,node-name=medium,size=1048576,read-zeroes=on,read-only=on"),
        *("-device", "ide-cd,bus=ide.0,drive=medium", "-device", "virtio-scsi-pci,id=scsi"),
        *("-blockdev", "driver=null-co,node-name=other,size=1048576,read-zeroes=on"),
        *("-device", "scsi-hd,bus=scsi.0,drive=other"),
    )
    guest = start(linux_machine(more=more), old)
    terminal = Line(lambda: os.open(pty(guest), os.O_RDWR | os.O_NOCTTY))
    lines = [Line.to_socket(serial), Line.to_socket(channel), terminal]
    guest.wait_for_ticks(5)
    assert all(line.answers("before") for line in lines)

    # In a downtime that is longer than the watchdog's timeout.
    report = HopDriver().run(guest, new, at="save", fault=lambda _: time.sleep(WATCHDOG + 1))
    assert report.outcome == "done"
    guest.wait_for_ticks(5)
    assert all(line.answers("in the new one") for line in lines)
    hop(guest, old)
    guest.wait_for_ticks(5)
    assert all(line.answers("in the old one") for line in lines)

    pid = guest.pid
    lines[0].answers("STARVE")  # unless QEMU ends before the answer is passed on
    assert wait_ended(pid, 60)
    verdict = guest.stop()
    assert verdict.writes
    assert verdict.unharmed, verdict
