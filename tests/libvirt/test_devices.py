"""A domain with about everything that one can have: what the guest still has after an upgrade, and what is refused."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest
from bench.downtime import memory_of

from tests.support.guests import counter, host_memory, linux
from tests.support.guests.build import Unavailable
from tests.support.guests.daemon import Daemon, DomainGuest
from tests.support.guests.enclosure import GUESTS
from tests.support.guests.lines import Line
from tests.support.guests.running import wait_until

from .conftest import StartDomain

#: Seconds in which the guest must answer.
PATIENCE = 150.0

#: Seconds that the guest's watchdog goes without food (linux_init.c).
WATCHDOG = 8.0

CPU = """<cpu mode='custom' match='exact' check='none'><model fallback='allow'>qemu64</model><numa>
    <cell id='0' cpus='0' memory='192' unit='MiB'/><cell id='1' cpus='1' memory='64' unit='MiB'/></numa></cpu>"""

ONE_NODE = """<cpu mode='custom' match='exact' check='none'><model fallback='allow'>qemu64</model><numa>
    <cell id='0' cpus='0' memory='64' unit='MiB'/></numa></cpu>"""

#: For memory that is plugged in.
ROOM = "<maxMemory slots='4' unit='MiB'>1024</maxMemory>"

DIMM = "<memory model='dimm'><target><size unit='MiB'>128</size><node>1</node></target></memory>"

BRIDGED = """<interface type='bridge'><source bridge='{}'/><model type='virtio'/><driver queues='2'/></interface>"""

DEVICES = f"""
    <disk type='file' device='cdrom'><driver name='qemu' type='raw'/><source file='{GUESTS}/medium.iso'/>
      <target dev='sda' bus='sata'/><readonly/></disk>
    <serial type='unix'><source mode='bind' path='{GUESTS}/serial'/></serial>
    <channel type='unix'>
      <target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <channel type='unix'><source mode='bind' path='{GUESTS}/channel'/>
      <target type='virtio' name='org.example.channel'/></channel>
    <tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>
    <watchdog model='i6300esb' action='poweroff'/>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
    <controller type='usb' model='qemu-xhci'/>
    <input type='tablet' bus='usb'/>
    <sound model='ich9'/>
    <audio id='1' type='none'/>
    <panic model='isa'/>
    <graphics type='vnc' socket='{GUESTS}/vnc'/>
    <video><model type='vga'/></video>
"""


def console(guest: DomainGuest) -> Line:
    """The domain's console; it is another pty after a hop."""

    def open_it() -> int:
        path = guest.daemon.virsh("ttyconsole", guest.name)
        return os.open(path, os.O_RDWR | os.O_NOCTTY)

    return Line(open_it)


def inside(daemon: Daemon, name: str) -> Path:
    """One of the guests' files."""
    return daemon.root / str(GUESTS).lstrip("/") / name


def agent_answers(guest: DomainGuest) -> bool:
    """Whether libvirt reaches the guest's agent."""
    done = guest.daemon.run("virsh", "qemu-agent-command", guest.name, '{"execute": "guest-ping"}')
    return done.returncode == 0


def test_guest_with_every_device_survives_upgrades(daemon: Daemon, start: StartDomain, old: Path, new: Path) -> None:
    """
    Linux by UEFI, on two NUMA nodes, with a bridged card of two queues, there and back: it writes, pings and counts on,
    and echoes each line. Memory is plugged in. Its TPM has what the guest has put there.
    Its watchdog waits, however long it is paused.
    """
    try:
        images = linux.images()
    except Unavailable as err:
        pytest.skip(f"no Linux guest: {err}")
    inside(daemon, "medium.iso").write_bytes(bytes(1 << 20))
    with daemon.bridge() as bridge:
        guest = start(
            accelerator="tcg",
            memory_mib=256,
            vcpus=2,
            cpu=CPU,
            interface=BRIDGED.format(bridge),
            serial="pty",
            balloon="virtio",
            more=DEVICES,
            elements=ROOM,
            linux=images,
            uefi=True,
        )
        lines = [console(guest), *(Line.to_socket(inside(daemon, name)) for name in ("serial", "channel"))]
        guest.wait_for_ticks()
        assert all(line.answers("before") for line in lines)
        assert "TPM\n" in guest.file("log").read_text(errors="replace").replace("\r", "")
        inside(daemon, "dimm.xml").write_text(DIMM)
        daemon.virsh("attach-device", guest.name, GUESTS / "dimm.xml", "--live")
        assert plugged(guest) == 128 << 20

        for emulator in (new, old):
            report = daemon.upgrade(guest.name, "--emulator", emulator, "--timeout", "60")
            assert report["outcome"] == "done", report
            transit, rehearsal = report["notes"]
            assert transit == "not by way of a transit: its TPM exits with the old QEMU"
            assert rehearsal.startswith("not rehearsed: -tpmdev")
            assert guest.emulator() == str(emulator)
            guest.wait_for_ticks()
            assert [line.answers(f"in {emulator}") for line in lines] == [True, True, True]
            assert agent_answers(guest)
            assert plugged(guest) == 128 << 20
            assert Path(daemon.root, f"sys/class/net/{bridge}/lower_{card(guest)}").exists()
        # The guest sets it while it runs, and the file is QEMU's, whichever it is.
        written = linux.uefi_variable(guest.file("fd"))
        assert written is not None
        wait_until(lambda: (linux.uefi_variable(guest.file("fd")) or 0) > written, PATIENCE, "it is written again")

        paused = time.monotonic()
        daemon.virsh("suspend", guest.name)
        assert daemon.upgrade(guest.name, "--emulator", new)["outcome"] == "done"
        wait_until(lambda: time.monotonic() > paused + WATCHDOG + 1, 2 * WATCHDOG, "the watchdog's timeout has passed")
        daemon.virsh("resume", guest.name)
        guest.wait_for_ticks()

        # It could have bitten.
        lines[-1].answers("STARVE")  # unless its QEMU ends before the answer is passed on
        wait_until(lambda: guest.state == "shut off", PATIENCE, "the watchdog switches the guest off")
        verdict = guest.judge()
        assert verdict.writes
        assert verdict.unharmed, verdict


def plugged(guest: DomainGuest) -> int:
    """Bytes of memory that have been plugged in."""
    return int(guest.monitor("query-memory-size-summary")["return"]["plugged-memory"])


def card(guest: DomainGuest) -> str:
    """The name of its network card on the host; it is another one after a hop."""
    return guest.daemon.virsh("domiflist", guest.name).split()[0]


def test_numa_nodes_and_plugged_memory_survive_upgrades(
    daemon: Daemon, start: StartDomain, old: Path, new: Path
) -> None:
    """All of it is in the rehearsal, too."""
    guest = start(memory_mib=256, vcpus=2, cpu=CPU, elements=ROOM)
    guest.wait_for_ticks()
    inside(daemon, "dimm.xml").write_text(DIMM)
    daemon.virsh("attach-device", guest.name, GUESTS / "dimm.xml", "--live")
    for emulator in (new, old):
        report = daemon.upgrade(guest.name, "--emulator", emulator)
        assert report["outcome"] == "done", report
        assert report["notes"] == ["not by way of a transit: plugged memory is not supported"]
        assert plugged(guest) == 128 << 20
        guest.wait_for_ticks()


def test_upgrade_needs_no_additional_huge_pages(daemon: Daemon, start: StartDomain, old: Path, new: Path) -> None:
    """As many as the guest has are enough, also for the rehearsal."""
    try:
        with host_memory.huge_pages(32):
            guest = start(memory="huge")
            guest.wait_for_ticks()
            assert "hugetlb" in Path(f"/proc/{guest.pid}/cmdline").read_text()
            for emulator in (new, old):
                report = daemon.upgrade(guest.name, "--emulator", emulator)
                assert (report["outcome"], report["notes"]) == ("done", []), report
                guest.wait_for_ticks()
            guest.end()
    except Unavailable as err:
        pytest.skip(str(err))


def test_upgrade_keeps_transparent_huge_pages(daemon: Daemon, start: StartDomain, old: Path, new: Path) -> None:
    """An upgrade leaves them whole."""
    try:
        with host_memory.transparent_huge_pages():
            guest = start(memory_mib=64)
            guest.wait_for_ticks()
            # The guest itself does not touch this. QEMU may have mapped the memory where huge pages do not fit.
            memory = memory_of(guest.pid)
            assert memory is not None
            with memory.open("r+b") as file:
                file.seek(counter.PATTERN_END)
                file.write(bytes(8 << 20))
            huge = host_memory.huge_pages_of(memory)
            assert huge >= 4 << 20
            for emulator in (new, old):
                report = daemon.upgrade(guest.name, "--emulator", emulator)
                assert (report["outcome"], report["notes"]) == ("done", []), report
                guest.wait_for_ticks()
                memory = memory_of(guest.pid)
                assert memory is not None
                assert host_memory.huge_pages_of(memory) >= huge
            guest.end()
    except Unavailable as err:
        pytest.skip(str(err))


def test_upgrade_allocates_no_pages_of_large_sparse_memory(daemon: Daemon, start: StartDomain, new: Path) -> None:
    """64 GiB, with 36 vCPUs: no page of it comes into being."""

    def touched() -> int:
        memory = memory_of(guest.pid)
        assert memory is not None
        return memory.stat().st_blocks

    guest = start(memory_mib=64 << 10, vcpus=36)
    guest.wait_for_ticks()
    before = touched()
    report = daemon.upgrade(guest.name, "--emulator", new)
    assert (report["outcome"], report["notes"]) == ("done", []), report
    print(f"downtime {report['downtime_ms']:.0f} ms")
    assert touched() == before
    assert len(guest.monitor("query-cpus-fast")["return"]) == 36
    guest.wait_for_ticks()


def test_guest_with_qxl_and_spice_hops_without_rehearsal(daemon: Daemon, start: StartDomain, old: Path) -> None:
    """Its video memory cannot be rehearsed. Debian 12's QEMU has it, later ones have it in a package of their own."""
    spice = f"<graphics type='spice'><listen type='socket' socket='{GUESTS}/spice'/></graphics>"
    guest = start(more=f"{spice}<video><model type='qxl'/></video><channel type='spicevmc'>{AGENT}</channel>")
    guest.wait_for_ticks()
    report = daemon.upgrade(guest.name, "--emulator", old)
    assert report["outcome"] == "done", report
    transit, rehearsal = report["notes"]
    assert transit == "not by way of a transit: a SPICE display has a state of its own"
    assert rehearsal.startswith("not rehearsed: qxl")
    guest.wait_for_ticks()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(inside(daemon, "spice")))


AGENT = "<target type='virtio' name='com.redhat.spice.0'/>"

#: What a destination cannot be given, as far as a test can have it: in XML, and as it is called.
REFUSED = {
    "<shmem name='shared'><model type='ivshmem-plain'/><size unit='MiB'>1</size></shmem>": "<shmem>",
    f"<filesystem type='mount'><source dir='{GUESTS}'/><target dir='files'/></filesystem>": "<filesystem>",
    f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{GUESTS}/passing.qcow2'/>"
    "<target dev='vdb' bus='virtio'/><transient/></disk>": "<transient> of a <disk>",
    f"<memory model='nvdimm'><source><path>{GUESTS}/nvdimm</path></source><target><size unit='MiB'>128</size>"
    "<node>0</node><label><size unit='KiB'>128</size></label></target></memory>": "<memory model='nvdimm'>",
}


def test_devices_that_cannot_be_handed_over_are_refused(
    daemon: Daemon, start: StartDomain, old: Path, new: Path
) -> None:
    """Each by its name, and the guest keeps running."""
    assert daemon.run("qemu-img", "create", "-q", "-f", "qcow2", GUESTS / "passing.qcow2", "1M").returncode == 0
    inside(daemon, "nvdimm").write_bytes(b"")
    guest = start(more="".join(REFUSED), cpu=ONE_NODE, elements=ROOM)
    guest.wait_for_ticks()
    pid = guest.pid
    report = daemon.upgrade(guest.name, "--emulator", new)
    assert (report["status"], report["outcome"]) == (1, "refused"), report
    assert "FAIL devices" in daemon.sevhop("check", guest.name).stdout
    for name in REFUSED.values():
        assert f"{name}: " in report["reason"]
    assert guest.pid == pid
    assert guest.emulator() == str(old)
    guest.wait_for_ticks()
