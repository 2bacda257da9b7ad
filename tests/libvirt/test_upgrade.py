"""Upgrades that arrive: what libvirt and the guest see of them."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from sevhop.libvirt.domain import METADATA

from tests.support.guests.daemon import Daemon, DomainGuest
from tests.support.guests.enclosure import GUESTS, PROGRAMS
from tests.support.guests.running import GuestFailed

from .conftest import StartDomain


def without_emulator(guest: DomainGuest, *options: str) -> str:
    """The domain's XML, but for the emulator."""
    return guest.xml(*options).replace(guest.emulator(*options), "EMULATOR")


def test_upgrade_changes_only_the_emulator_there_and_back(
    daemon: Daemon, start: StartDomain, old: Path, new: Path
) -> None:
    guest = start()
    guest.wait_for_ticks()
    uuid, inactive = daemon.virsh("domuuid", guest.name), without_emulator(guest, "--inactive")
    pids = {guest.pid}
    for emulator in (new, old, old):
        report = daemon.upgrade(guest.name, "--emulator", emulator)
        assert report["outcome"] == "done", report
        assert report["status"] == 0
        assert report["notes"] == []
        assert guest.state == "running"
        assert daemon.virsh("domuuid", guest.name) == uuid
        assert guest.emulator() == guest.emulator("--inactive") == str(emulator)
        assert without_emulator(guest, "--inactive") == inactive
        assert report["destination"]["pid"] == guest.pid
        assert guest.pid not in pids
        pids.add(guest.pid)
        guest.wait_for_ticks()
    assert guest.xml().count("SEVHOP_MONITOR") == 1  # what the last hop added, and nothing of those before


def test_qemu_that_reads_no_stream_from_a_file_is_supported(
    daemon: Daemon, start: StartDomain, old: Path, newest: Path
) -> None:
    """QEMU 11 and later. It refuses the descriptor that libvirt passes for an ordinary image."""
    guest = start()
    guest.wait_for_ticks()
    for emulator in (newest, old):
        report = daemon.upgrade(guest.name, "--emulator", emulator)
        assert (report["outcome"], report["reason"]) == ("done", "")
        assert guest.emulator() == str(emulator)
        guest.wait_for_ticks()


def test_prepared_upgrade_to_newest_qemu_is_completed_by_virsh(
    daemon: Daemon, start: StartDomain, newest: Path
) -> None:
    guest = start()
    guest.wait_for_ticks()
    report = daemon.upgrade(guest.name, "--emulator", newest, "--prepare")
    assert report["outcome"] == "prepared", report
    daemon.virsh("restore", report["image"])
    assert guest.emulator() == str(newest)
    guest.wait_for_ticks()
    assert daemon.sevhop("recover").returncode == 0


def test_cpu_in_live_xml_is_unchanged_by_an_upgrade(daemon: Daemon, start: StartDomain, old: Path) -> None:
    """libvirt computes it at each start, and a destination reports only what matters (cpu_properties.c)."""

    def cpu() -> str:
        found = ElementTree.fromstring(guest.xml()).find("cpu")
        assert found is not None
        return ElementTree.tostring(found, encoding="unicode")

    try:
        guest = start(cpu="<cpu mode='host-model'/>")
    except GuestFailed as err:
        pytest.skip(f"the accelerator of this machine cannot be this processor's: {err}")
    guest.wait_for_ticks()
    before = cpu()
    assert before.count("<feature") > 10
    assert daemon.upgrade(guest.name, "--emulator", old)["outcome"] == "done"
    assert cpu() == before
    guest.wait_for_ticks()


def test_paused_guest_stays_paused(daemon: Daemon, start: StartDomain, new: Path) -> None:
    guest = start(balloon="virtio")
    guest.wait_for_ticks()
    daemon.virsh("suspend", guest.name)
    report = daemon.upgrade(guest.name, "--emulator", new)
    assert report["outcome"] == "done", report
    assert report["downtime_ms"] is None
    assert guest.state == "paused"
    assert guest.emulator() == str(new)
    daemon.virsh("resume", guest.name)
    guest.wait_for_ticks()


def test_prepared_upgrade_without_a_transit_is_completed_by_virsh(
    daemon: Daemon, start: StartDomain, new: Path
) -> None:
    guest = start()
    guest.wait_for_ticks()
    report = daemon.upgrade(guest.name, "--no-transit", "--emulator", new, "--prepare")
    assert report["outcome"] == "prepared", report
    assert guest.state == "shut off"
    refused = daemon.run("virsh", "start", guest.name)
    assert refused.returncode == 1
    assert "virsh restore" in refused.stderr
    assert "waiting" in daemon.sevhop("status").stdout
    assert "was prepared, and is not finished (run: sevhop recover" in daemon.upgrade(guest.name)["reason"]
    assert daemon.sevhop("uninstall").returncode == 1
    done = daemon.sevhop("recover")
    assert (done.returncode, guest.state) == (0, "shut off")
    assert f"suspended in the keeper; resume it with: virsh restore {report['image']}" in done.stdout
    daemon.virsh("restore", report["image"])
    assert guest.state == "running"
    assert guest.emulator() == str(new)
    guest.wait_for_ticks()
    # libvirt was restoring, so the definition had to wait.
    one = daemon.recover_one()
    assert (one["status"], one["result"], one["detail"]) == (0, "destination", ""), one
    assert guest.emulator("--inactive") == str(new)


def test_tap_device_is_re_created(daemon: Daemon, start: StartDomain, new: Path) -> None:
    if not Path("/dev/net/tun").exists():
        pytest.skip("this host has no taps")
    name = "sevhop-test-tap"
    guest = start(more=f"<interface type='ethernet'><target dev='{name}'/><model type='virtio'/></interface>")
    guest.wait_for_ticks()
    before = Path(daemon.root, f"sys/class/net/{name}/ifindex").read_text()
    assert daemon.upgrade(guest.name, "--emulator", new)["outcome"] == "done"
    assert Path(daemon.root, f"sys/class/net/{name}/ifindex").read_text() != before
    assert name in daemon.virsh("domiflist", guest.name)
    guest.wait_for_ticks()
    guest.end()
    assert not Path(daemon.root, f"sys/class/net/{name}").exists()


def test_upgrade_all_skips_domains_that_cannot_hop(daemon: Daemon, start: StartDomain, new: Path) -> None:
    private, *others = [start(name="a", memory="private"), start(name="b"), start(name="c")]
    for guest in others:
        guest.wait_for_ticks()
    pids = {guest.name: guest.pid for guest in (private, *others)}
    done = daemon.sevhop("upgrade", "a", "b", "--emulator", new)
    assert (done.returncode, done.stdout) == (1, "2 domains: 1 refused, 1 not tried\n")
    done = daemon.sevhop("upgrade", "--all", "--dry-run")
    assert done.returncode == 1
    assert done.stdout.endswith("3 domains: 1 refused, 2 checked\n")
    assert {guest.name: guest.pid for guest in (private, *others)} == pids

    done = daemon.sevhop("upgrade", "--all", "--json", "--emulator", new)
    assert done.returncode == 1
    domains = json.loads(done.stdout)["domains"]
    assert [(one["guest"], one["outcome"]) for one in domains] == [("a", "refused"), ("b", "done"), ("c", "done")]
    assert private.pid == pids["a"]
    for guest in others:
        assert guest.emulator() == str(new)
        guest.wait_for_ticks()


def test_named_domains_are_looked_up_before_the_first_is_touched(daemon: Daemon, start: StartDomain, new: Path) -> None:
    """By name, UUID or id, as virsh does it; a name may look like an id."""
    guest, numbered = start(name="b"), start(name="4711")
    pid = guest.pid
    done = daemon.sevhop("upgrade", "b", "no-such-domain", "--json", "--emulator", new)
    found = json.loads(done.stdout)
    assert (done.returncode, found["domains"]) == (1, [])
    assert "no domain with matching name 'no-such-domain'" in found["reason"]
    assert guest.pid == pid
    number = daemon.virsh("domid", "b")
    for name in ("b", daemon.virsh("domuuid", "b"), daemon.virsh("domuuid", "b").replace("-", "").upper(), number):
        done = daemon.sevhop("upgrade", name, "b", "--dry-run", "--json", "--emulator", new)
        assert [one["guest"] for one in json.loads(done.stdout)["domains"]] == ["b"], name
        assert daemon.sevhop("check", name, "--emulator", new).returncode == 0
        assert daemon.sevhop("status", name).stdout.startswith("b: ")
    done = daemon.sevhop("upgrade", "4711", "--dry-run", "--json", "--emulator", new)
    assert [one["guest"] for one in json.loads(done.stdout)["domains"]] == [numbered.name]
    unknown = daemon.sevhop("recover", "no-such-domain").stderr
    assert unknown.startswith("sevhop: neither a domain nor an interrupted hop is named no-such-domain")


def test_domains_are_excluded_by_pattern_and_by_their_owner(daemon: Daemon, start: StartDomain, new: Path) -> None:
    for name in ("db-1", "db-2", "mail", "web"):
        start(name=name)
    element = "<leave-alone reason='licence'/>"
    daemon.virsh("metadata", "mail", "--uri", METADATA, "--key", "sevhop", "--set", element, "--live", "--config")
    done = daemon.sevhop("upgrade", "--all", "--exclude", "db-*", "--dry-run", "--json", "--emulator", new)
    found = json.loads(done.stdout)
    assert [one["guest"] for one in found["domains"]] == ["web"]
    assert found["excluded"] == ["db-1", "db-2", "mail"]
    done = daemon.sevhop("upgrade", "--outdated", "--exclude", "[dw]*", "--emulator", new)
    assert (done.returncode, done.stdout) == (0, "no other domain is outdated; excluded: db-1, db-2, mail, web\n")
    done = daemon.sevhop("upgrade", "mail", "--dry-run", "--emulator", new)
    assert done.stdout.startswith("mail: "), "it was named"


def test_upgrade_outdated_selects_only_outdated_domains(
    daemon: Daemon, start: StartDomain, old: Path, new: Path
) -> None:
    """One of them was started from a file that is another one now, though of the same version."""
    replaced, other = start(name="replaced", emulator=old), start(name="other", emulator=new)
    replaced.wait_for_ticks()
    pid = other.pid
    done = daemon.sevhop("upgrade", "--outdated")
    assert (done.returncode, done.stdout) == (0, "no domain is outdated\n")
    copy = PROGRAMS / "another-file"
    shutil.copy(old, daemon.root / str(copy).lstrip("/"))
    assert daemon.run("mount", "--bind", copy, old).returncode == 0
    try:
        rows = {row["name"]: row for row in json.loads(daemon.sevhop("status", "--json").stdout)["domains"]}
        assert (rows["replaced"]["binary_state"], rows["replaced"]["outdated"]) == ("replaced", True)
        assert (rows["other"]["binary_state"], rows["other"]["outdated"]) == ("unchanged", False)
        assert "binary was replaced on disk" in daemon.sevhop("check", "replaced").stdout

        done = daemon.sevhop("upgrade", "--outdated", "--json")
        assert done.returncode == 0, done.stdout
        assert [one["guest"] for one in json.loads(done.stdout)["domains"]] == ["replaced"]
        replaced.wait_for_ticks()
        assert other.pid == pid
        assert "replaced: QEMU 7.2" in daemon.sevhop("status").stdout
        assert "on disk" not in daemon.sevhop("status").stdout
        # With an emulator named, that one is the measure.
        done = daemon.sevhop("upgrade", "--outdated", "--dry-run", "--emulator", new)
        assert done.stdout.startswith("replaced: QEMU 7.2")
        assert len(done.stdout.splitlines()) == 1
    finally:
        daemon.run("umount", "--lazy", old)


def test_upgrade_all_tries_no_further_domain_when_interrupted(daemon: Daemon, start: StartDomain, new: Path) -> None:
    first, second = start(name="one"), start(name="two")
    first.wait_for_ticks()
    pid = second.pid
    command = daemon.start_command(
        *(sys.executable, "-m", "sevhop.cli", "--verbose"),
        *("upgrade", "--all", "--keep-going", "--json", "--emulator", new),
    )
    assert command.stderr is not None
    for line in command.stderr:
        if line.strip().endswith("one: acquire"):
            command.send_signal(signal.SIGINT)
            break
    out, _ = command.communicate(timeout=120)
    # If the signal came too late the first domain has arrived; the second one is not tried all the same.
    (report,) = json.loads(out)["domains"]
    assert (report["outcome"], command.returncode) in (("rolled-back", 3), ("done", 0))
    assert second.pid == pid
    first.wait_for_ticks()


def test_persistent_definition_keeps_an_emulator_of_its_own(
    daemon: Daemon, start: StartDomain, new: Path, newest: Path
) -> None:
    """Somebody has set it for the next start."""
    guest = start()
    guest.wait_for_ticks()
    guest.file("next").write_text(guest.xml("--inactive").replace(guest.emulator(), str(newest)))
    daemon.virsh("define", f"{GUESTS}/{guest.name}.next")
    report = daemon.upgrade(guest.name, "--emulator", new)
    assert (report["outcome"], report["notes"]) == (
        "done",
        [f"the persistent definition keeps its own emulator, {newest}"],
    )
    assert (guest.emulator(), guest.emulator("--inactive")) == (str(new), str(newest))


@pytest.mark.parametrize("serial", ["file", "pty"])
def test_log_that_libvirt_empties_at_a_start_is_kept(
    daemon: Daemon, start: StartDomain, old: Path, new: Path, serial: str
) -> None:
    guest = start(serial=serial, append=False)
    for emulator in (new, old):
        guest.wait_for_ticks()
        printed = guest.file("log").read_bytes()
        assert daemon.upgrade(guest.name, "--emulator", emulator)["outcome"] == "done"
        guest.wait_for_ticks()
        assert guest.file("log").read_bytes().startswith(printed)
    assert "append" not in guest.xml("--inactive")
