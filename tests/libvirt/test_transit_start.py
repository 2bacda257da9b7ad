"""The first half of an upgrade by way of a transit: the guest hops there, and libvirt ends the domain without it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sevhop.engine.transit import Transit
from sevhop.process import machine_cgroup
from sevhop_qmp import adopt
from sevhop_qmp.process import QemuProcess

from tests.support.guests import linux
from tests.support.guests.build import Unavailable
from tests.support.guests.daemon import Daemon, DomainGuest
from tests.support.guests.enclosure import GUESTS
from tests.support.guests.running import wait_ended, wait_until

from .cgrouped import MachineCgroups, groups_of
from .conftest import StartDomain
from .failing import CANNOT_LOAD, DYING, assert_as_before, wrapper
from .lived import LivedInDomain

PATIENCE = 150.0
_PROGRAM = Path(__file__).with_name("transiting.py")

BRIDGED = """<interface type='bridge'><source bridge='{}'/><model type='virtio'/><driver queues='2'/></interface>"""
USER = "<interface type='user'><model type='virtio'/></interface>"
CHANNEL = f"""<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <channel type='unix'><source mode='bind' path='{GUESTS}/channel'/>
      <target type='virtio' name='org.example.channel'/></channel>"""
#: What else a domain has; the name of one tap is fixed.
OTHERS = f"""<interface type='ethernet'><target dev='sevhop-test' managed='yes'/><model type='virtio'/></interface>
    <interface type='ethernet'><model type='e1000e'/></interface>
    <disk type='file' device='cdrom'><target dev='sdb' bus='sata'/><readonly/></disk>
    <console type='pty'><target type='virtio'/></console>
    <graphics type='vnc' socket='{GUESTS}/vnc'/><video><model type='vga'/></video>
    <input type='tablet' bus='usb'/><sound model='ich9'/>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>"""


class Transits:
    """Has domains hop into transits, which are ended by :meth:`close`."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._pids: set[int] = set()
        self._directories: set[Path] = set()
        self._cgroups: set[str] = set()

    def hop(self, guest: DomainGuest, emulator: Path, fault: str = "") -> dict[str, Any]:
        """What is reported."""
        done = self._daemon.run(sys.executable, _PROGRAM, "hop", guest.name, emulator, fault)
        assert done.stdout, done.stderr
        report: dict[str, Any] = json.loads(done.stdout)
        if pid := report["destination_pid"]:
            self._pids.add(pid)
        self._cgroups.update(report.get("cgroups", ()))
        if directory := report.get("directory"):
            self._directories.add(self._daemon.root / directory.lstrip("/"))
        if report["outcome"] != "done":
            print(json.dumps(report, indent=2), done.stderr, file=sys.stderr)
        return report

    def retire(self, guest: DomainGuest, report: dict[str, Any]) -> None:
        """Have libvirt shut the domain off."""
        done = self._daemon.run(sys.executable, _PROGRAM, "retire", guest.name, str(report["source_pid"]))
        assert done.returncode == 0, done.stderr

    def status(self, report: dict[str, Any]) -> adopt.AdoptStatus:
        """What adopt.so reports in a transit that nobody is connected to."""

        async def asked() -> adopt.AdoptStatus:
            process = QemuProcess.open(report["destination_pid"])
            transit = await Transit.reach(process, self._daemon.root / report["directory"].lstrip("/"))
            status = await adopt.adopt_status(transit.monitor)
            await transit.leave()
            return status

        return asyncio.run(asked())

    def close(self) -> None:
        """End what is left. Its disk is written by then, since nothing in it is cached."""
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            assert wait_ended(pid, 10)
        self._pids.clear()
        for directory in self._directories:
            shutil.rmtree(directory, ignore_errors=True)
        self._directories.clear()
        machine_cgroup.remove(self._cgroups)
        self._cgroups.clear()


@pytest.fixture
def transits(daemon: Daemon, start: StartDomain) -> Iterator[Transits]:
    """Ends transits before the rest of the test is cleaned up, also if it fails."""
    found = Transits(daemon)
    yield found
    found.close()


def received(daemon: Daemon, card: str) -> int:
    """The packets that a card of a guest has sent, by its tap."""
    return int((daemon.root / f"sys/class/net/{card}/statistics/rx_packets").read_text())


def assert_goes_on_without_libvirt(transits: Transits, guest: DomainGuest, report: dict[str, Any]) -> None:
    """It does in the transit, before libvirt learns of it and afterwards."""
    assert report["outcome"] == "done", report
    assert report["notes"] == []
    assert report["downtime_ms"] is not None
    guest.wait_for_ticks()
    assert guest.state == "paused"
    status = transits.status(report)
    assert (status.finished, status.ram, status.deferred_tap_settings) == (True, "shared", 0)
    transits.retire(guest, report)
    assert guest.state == "shut off"
    guest.wait_for_ticks()


@pytest.mark.parametrize("there", [True, False], ids=["to the newer", "to the older"])
def test_guest_goes_on_in_a_transit(
    there: bool, daemon: Daemon, start: StartDomain, transits: Transits, old: Path, new: Path
) -> None:
    """Linux: it writes to its disk, and pings by the bridged card of two queues."""
    try:
        images = linux.images()
    except Unavailable as err:
        pytest.skip(f"no Linux guest: {err}")
    with daemon.bridge() as bridge:
        guest = start(
            emulator=old if there else new,
            accelerator="tcg",
            memory_mib=256,
            vcpus=2,
            interface=BRIDGED.format(bridge),
            balloon="virtio",
            more=USER + CHANNEL,
            linux=images,
        )
        guest.wait_for_ticks()
        card = daemon.virsh("domiflist", guest.name).split()[0]
        report = transits.hop(guest, new if there else old)
        assert_goes_on_without_libvirt(transits, guest, report)
        sent = received(daemon, card)
        guest.wait_for_ticks()
        assert received(daemon, card) > sent
        transits.close()
        verdict = guest.judge()
        assert verdict.writes
        assert verdict.unharmed, verdict
        guest.end()


@pytest.mark.parametrize("there", [True, False], ids=["to the newer", "to the older"])
def test_guest_with_other_devices_goes_on_in_a_transit(
    there: bool, daemon: Daemon, start: StartDomain, transits: Transits, old: Path, new: Path
) -> None:
    guest = start(emulator=old if there else new, vcpus=2, balloon="virtio", more=CHANNEL + OTHERS, append=False)
    guest.wait_for_ticks()
    assert_goes_on_without_libvirt(transits, guest, transits.hop(guest, new if there else old))


def test_guest_in_flash_goes_on_in_a_transit(start: StartDomain, transits: Transits, new: Path) -> None:
    """Its firmware is an image that is read, and its variables one that is written."""
    guest = start(pflash=True)
    guest.wait_for_ticks()
    assert_goes_on_without_libvirt(transits, guest, transits.hop(guest, new))


def test_paused_guest_stays_paused_in_a_transit(
    daemon: Daemon, start: StartDomain, transits: Transits, new: Path
) -> None:
    with daemon.bridge() as bridge:
        guest = start(interface=BRIDGED.format(bridge))
        guest.wait_for_ticks()
        daemon.virsh("suspend", guest.name)
        ticks = guest.seen().ticks
        report = transits.hop(guest, new)
        assert (report["outcome"], report["downtime_ms"]) == ("done", None)
        status = transits.status(report)
        assert (status.finished, status.ran, status.deferred_tap_settings) == (True, False, 0)
        transits.retire(guest, report)
        assert guest.seen().ticks == ticks
        transits.close()
        guest.end()


@pytest.mark.parametrize("phase", ["stop", "map", "save", "load"])
def test_source_is_resumed_when_the_transit_dies(
    phase: str, daemon: Daemon, start: StartDomain, transits: Transits, old: Path, new: Path
) -> None:
    with daemon.bridge() as bridge:
        guest = start(interface=BRIDGED.format(bridge), more=USER)
        guest.wait_for_ticks()
        pid = guest.pid
        report = transits.hop(guest, new, f"{phase} destination")
        assert (report["outcome"], report["guest_state"]) == ("rolled-back", "GuestState.RUNNING_IN_OLD"), report
        assert guest.pid == pid
        assert_as_before(daemon, guest, old)
        guest.end()


@pytest.mark.parametrize("phase", ["map", "save", "load"])
def test_guest_that_another_client_resumes_stays_in_the_source(
    phase: str, daemon: Daemon, start: StartDomain, transits: Transits, old: Path, new: Path
) -> None:
    guest = start()
    guest.wait_for_ticks()
    report = transits.hop(guest, new, f"{phase} resume")
    assert (report["outcome"], report["guest_state"]) == ("rolled-back", "GuestState.RUNNING_IN_OLD"), report
    assert "another client has resumed the guest" in report["reason"]
    assert_as_before(daemon, guest, old)


def test_guest_that_another_client_suspends_stays_so(
    daemon: Daemon, start: StartDomain, transits: Transits, new: Path
) -> None:
    guest = start()
    guest.wait_for_ticks()
    report = transits.hop(guest, new, "stop suspend")
    assert report["outcome"] == "rolled-back", report
    assert guest.state == "paused"
    daemon.virsh("resume", guest.name)
    guest.wait_for_ticks()


def test_domain_that_another_client_destroys_is_off(
    daemon: Daemon, start: StartDomain, transits: Transits, new: Path
) -> None:
    guest = start()
    guest.wait_for_ticks()
    report = transits.hop(guest, new, "stop destroy")
    assert report["outcome"] == "guest-lost", report
    assert guest.state == "shut off"
    assert not Path(f"/proc/{report['destination_pid']}").exists()


FAILING = {"cannot load": (CANNOT_LOAD, "rolled-back"), "dies at once": (DYING["dies at once"], "rolled-back")}


@pytest.mark.parametrize("how", FAILING)
def test_source_is_resumed_when_the_emulator_fails(
    how: str, daemon: Daemon, start: StartDomain, transits: Transits, old: Path, new: Path
) -> None:
    text, outcome = FAILING[how]
    guest = start()
    guest.wait_for_ticks()
    pid = guest.pid
    report = transits.hop(guest, wrapper(daemon, f"transit-{how.replace(' ', '-')}", new, text))
    assert report["outcome"] == outcome, report
    assert guest.pid == pid
    assert_as_before(daemon, guest, old)


def test_domain_with_a_tpm_is_refused(daemon: Daemon, start: StartDomain, transits: Transits, new: Path) -> None:
    if shutil.which("swtpm") is None:
        pytest.skip("there is no swtpm")
    guest = start(more="<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>")
    guest.wait_for_ticks()
    report = transits.hop(guest, new)
    assert (report["outcome"], report["cause"]) == ("refused", "Untransitable")
    assert report["reason"] == "its TPM exits with the old QEMU"
    assert (guest.state, report["destination_pid"]) == ("running", 0)


def test_transit_is_the_domains_equal(
    daemon: Daemon, start: StartDomain, transits: Transits, old: Path, new: Path
) -> None:
    """Its user, groups, limits, namespaces and sandbox are those of the domain's QEMU; nobody else reaches it."""
    guest = start(more=CHANNEL)
    guest.wait_for_ticks()

    def found(pid: int) -> dict[str, str]:
        rows = [row.partition(":") for row in Path(f"/proc/{pid}/status").read_text().splitlines()]
        kept = ("Uid", "Gid", "Groups", "Umask", "CapEff", "CapBnd", "NoNewPrivs", "Seccomp", "Seccomp_filters")
        facts = {name: value.strip() for name, _, value in rows if name in kept}
        facts |= {kind: os.readlink(f"/proc/{pid}/ns/{kind}") for kind in ("mnt", "net", "pid", "user")}
        return facts | {"oom": Path(f"/proc/{pid}/oom_score_adj").read_text()}

    before = found(guest.pid)
    report = transits.hop(guest, new)
    assert report["outcome"] == "done", report
    transit = report["destination_pid"]
    assert found(transit) == before
    directory = daemon.root / report["directory"].lstrip("/")
    assert (directory.stat().st_mode & 0o777, directory.stat().st_uid) == (0o700, 0)
    log = daemon.root / f"var/log/libvirt/qemu/{guest.name}.log"
    opened = [os.stat(path) for path in Path(f"/proc/{transit}/fd").iterdir() if path.exists()]
    assert not any(os.path.samestat(log.stat(), file) for file in opened)
    # It belongs to no session that ends with the command.
    wait_until(lambda: os.getsid(transit) == transit, PATIENCE, "it has a session of its own")
    transits.retire(guest, report)
    guest.wait_for_ticks()


@pytest.mark.parametrize("there", [True, False], ids=["to the newer", "to the older"])
def test_lived_in_guest_goes_on_in_a_transit(
    there: bool, daemon: Daemon, start: StartDomain, transits: Transits, old: Path, new: Path, tmp_path: Path
) -> None:
    """It has snapshots, a throttled disk, a bitmap, another medium, a disk and cards that were plugged ..."""
    emulator = old if there else new
    guest = LivedInDomain.started(daemon, start, f"lived-{tmp_path.name[-20:]}", emulator=emulator)
    file = f"{GUESTS}/{guest.name}-card.xml"
    with daemon.bridge() as bridge:
        (daemon.root / file.lstrip("/")).write_text(BRIDGED.format(bridge))
        daemon.virsh("attach-device", guest.name, file, "--live")
        guest.wait_for_ticks()
        assert_goes_on_without_libvirt(transits, guest, transits.hop(guest, new if there else old))
        transits.close()
        guest.end()


def test_transit_is_in_cgroups_of_its_own(start: StartDomain, transits: Transits, new: Path) -> None:
    """They have the limits of the domain's, which libvirt removes; and they are removed with the transit."""
    guest = start()
    guest.wait_for_ticks()
    try:
        with MachineCgroups.made(guest) as cgroups:
            before = groups_of(guest.pid)
            report = transits.hop(guest, new)
            assert (report["outcome"], report["notes"]) == ("done", []), report
            after = groups_of(report["destination_pid"])
            (copy,) = {Path(directory).name for directory in report["cgroups"]}
            for thread, groups in before.items():
                for controllers, path in groups.items():
                    own = cgroups.tops.get(controllers)
                    assert after[thread][controllers] == (path.replace(own.name, copy) if own else path)
            for controllers, own in cgroups.tops.items():
                for name in ("cpu.cfs_quota_us", "cpuset.cpus", "pids.max") if controllers else ():
                    for file in own.rglob(name):
                        assert Path(str(file).replace(own.name, copy)).read_text() == file.read_text()
            transits.retire(guest, report)
            cgroups.remove()
            guest.wait_for_ticks()
            transits.close()
            assert not any(Path(directory).exists() for directory in report["cgroups"])
    except Unavailable as err:
        pytest.skip(str(err))


def test_no_cgroup_is_left_after_a_rollback(start: StartDomain, transits: Transits, new: Path) -> None:
    guest = start()
    guest.wait_for_ticks()
    try:
        with MachineCgroups.made(guest) as cgroups:
            before = groups_of(guest.pid)
            assert transits.hop(guest, new, "save destination")["outcome"] == "rolled-back"
            assert groups_of(guest.pid) == before
            for own in cgroups.tops.values():
                assert [path.name for path in own.parent.iterdir() if path.is_dir()] == [own.name]
            guest.wait_for_ticks()
            guest.end()
    except Unavailable as err:
        pytest.skip(str(err))
