"""
``sevhop upgrade``: two hops, with libvirt's restart between them. Whatever fails, the guest runs: in its old
QEMU before the first hop's commit, afterwards in the transit.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.guests.daemon import Daemon, kill
from tests.support.guests.running import processes_of_domain, wait_until

from ..conftest import some_of
from .conftest import StartDomain
from .failing import DYING, assert_as_before, other_hook_hangs, other_hook_refuses, wrapper
from .holding import PausedUpgrade

#: Phases of the first hop, in which everything is rolled back; and those in which the guest may be in the transit.
UNDOABLE = ["acquire", "prepare", "stop", "map", "save"]
IN_TRANSIT = ["load", "commit", "resume", "finish", "keep", "retire", "restore"]
#: The more telling half of them by default.
PHASES = [
    phase
    if phase in ("prepare", "save", "load", "finish", "keep", "restore")
    else pytest.param(phase, marks=pytest.mark.long)
    for phase in (*UNDOABLE, *IN_TRANSIT)
]


def when_begun(daemon: Daemon, name: str, phase: str, act: Callable[[Any], None], *words: str | Path) -> Any:
    """Start an upgrade, and do something to it when a phase has begun. :return: its exit status, and what it prints."""
    command = daemon.start_command(
        *(sys.executable, "-m", "sevhop.cli", "--verbose", "upgrade", name, "--json", *words)
    )
    assert command.stderr is not None
    for line in command.stderr:
        if line.strip().endswith(f": {phase}"):
            act(command)
            break
    else:
        raise AssertionError(f"no phase {phase}")
    out, _ = command.communicate(timeout=120)
    return command.returncode, out


@pytest.mark.virtqemud
@pytest.mark.parametrize("back", [False, True], ids=["there", "back"])
def test_guest_runs_while_libvirt_restarts(
    daemon: Daemon, start: StartDomain, old: Path, new: Path, back: bool
) -> None:
    source, destination = (new, old) if back else (old, new)
    guest = start(emulator=source, balloon="virtio")
    guest.wait_for_ticks()
    pid = guest.pid
    report = daemon.upgrade(guest.name, "--emulator", destination)
    assert (report["status"], report["outcome"], report["notes"]) == (0, "done", []), report
    assert len(report["downtimes_ms"]) == 2
    assert report["downtime_ms"] == max(report["downtimes_ms"])
    phases = [phase["name"] for phase in report["phases"]]
    assert phases == list(dict.fromkeys(phases)), "each once"
    assert guest.pid == report["destination"]["pid"] != pid
    assert guest.state == "running"
    assert guest.emulator() == str(destination)
    assert guest.emulator("--inactive") == str(destination)
    guest.wait_for_ticks()


def test_paused_guest_stays_paused_in_both_hops(daemon: Daemon, start: StartDomain, new: Path) -> None:
    guest = start()
    guest.wait_for_ticks()
    daemon.virsh("suspend", guest.name)
    report = daemon.upgrade(guest.name, "--emulator", new)
    assert (report["outcome"], report["downtime_ms"]) == ("done", None), report
    assert guest.state == "paused"
    assert guest.emulator() == str(new)
    daemon.virsh("resume", guest.name)
    guest.wait_for_ticks()


def seen(daemon: Daemon, name: str) -> tuple[int, str, bool]:
    """The exit status of ``sevhop status``, and where it sees the guest, and whether a command is at work on it."""
    done = daemon.sevhop("status", "--json")
    (row,) = (row for row in json.loads(done.stdout)["domains"] if row["name"] == name)
    assert (row["elsewhere_s"] is not None) == (row["place"] == "transit")
    return done.returncode, row["place"], row["attended"]


def test_status_reports_where_the_guest_is(daemon: Daemon, start: StartDomain, new: Path) -> None:
    guest = start()
    guest.wait_for_ticks()
    assert seen(daemon, guest.name) == (0, "domain", True)
    for phase, place in (("save", "domain"), ("restore", "transit")):
        with PausedUpgrade.at(phase, guest, new) as upgrade:
            assert seen(daemon, guest.name) == (0, place, True)
            kill(upgrade.pid)
            assert seen(daemon, guest.name) == (4, place, False)
        assert daemon.sevhop("recover").returncode == 0
        assert seen(daemon, guest.name) == (0, "domain", True)
    guest.wait_for_ticks()


@pytest.mark.virtqemud
def test_prepared_guest_runs_in_the_transit_until_any_client_restores_it(
    daemon: Daemon, start: StartDomain, new: Path
) -> None:
    guest = start()
    guest.wait_for_ticks()
    report = daemon.upgrade(guest.name, "--emulator", new, "--prepare")
    assert (report["outcome"], report["in_transit"]) == ("prepared", True), report
    assert guest.state == "shut off"
    guest.wait_for_ticks()
    refused = daemon.run("virsh", "start", guest.name)
    assert refused.returncode == 1
    assert "transit" in refused.stderr
    assert "runs in the transit" in daemon.sevhop("status").stdout
    assert seen(daemon, guest.name) == (4, "transit", False)
    assert "sevhop recover" in daemon.upgrade(guest.name)["reason"]
    daemon.virsh("restore", report["image"])
    wait_until(lambda: guest.state == "running", 30, "it is restored")
    assert guest.emulator() == str(new)
    guest.wait_for_ticks()
    done = daemon.recover_one()
    assert (done["status"], done["result"], done["detail"]) == (0, "destination", ""), done
    assert guest.emulator("--inactive") == str(new)


def test_domain_that_a_transit_cannot_carry_is_upgraded_without(daemon: Daemon, start: StartDomain, new: Path) -> None:
    guest = start(more="<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>")
    guest.wait_for_ticks()
    report = daemon.upgrade(guest.name, "--emulator", new)
    assert (report["outcome"], report["downtimes_ms"]) == ("done", []), report
    assert "not by way of a transit: its TPM exits with the old QEMU" in report["notes"]
    guest.wait_for_ticks()


@pytest.mark.parametrize("how", some_of(DYING, 2))
def test_emulator_that_fails_is_found_out_in_the_first_hop(
    daemon: Daemon, start: StartDomain, old: Path, new: Path, how: str
) -> None:
    """The guest stays in its QEMU."""
    guest = start()
    guest.wait_for_ticks()
    pid = guest.pid
    emulator = wrapper(daemon, how.replace(" ", "-"), new, DYING[how])
    report = daemon.upgrade(guest.name, "--emulator", emulator)
    assert report["outcome"] in ("refused", "rolled-back"), report
    assert guest.pid == pid
    assert_as_before(daemon, guest, old)


def test_guest_runs_in_the_old_emulator_again_if_another_hook_refuses(
    daemon: Daemon, start: StartDomain, old: Path, new: Path
) -> None:
    guest = start()
    guest.wait_for_ticks()
    with other_hook_refuses(daemon):
        report = daemon.upgrade(guest.name, "--emulator", new)
    assert (report["status"], report["outcome"]) == (3, "rolled-back"), report
    assert report["guest_state"] == "running in the old QEMU"
    assert len(report["downtimes_ms"]) == 2
    assert_as_before(daemon, guest, old)


def test_guest_runs_in_the_transit_while_another_hook_hangs(daemon: Daemon, start: StartDomain, new: Path) -> None:
    """The destination is ended by the command, which is not a client that wants the guest to end."""
    guest = start()
    guest.wait_for_ticks()
    with other_hook_hangs(daemon):
        began = time.monotonic()
        report = daemon.upgrade(guest.name, "--emulator", new, "--timeout", "5")
        assert time.monotonic() - began < 60, "two steps, and not what libvirt needs"
        assert (report["status"], report["guest_state"]) == (4, "running in the transit"), report
        guest.wait_for_ticks()
    assert "runs in the transit" in daemon.sevhop("status").stdout
    done = daemon.sevhop("recover")
    assert (done.returncode, guest.state, guest.emulator()) == (0, "running", str(new)), done
    guest.wait_for_ticks()


@pytest.mark.parametrize("phase", PHASES)
def test_recover_finishes_or_rolls_back_after_the_command_was_killed(
    daemon: Daemon, start: StartDomain, old: Path, new: Path, phase: str
) -> None:
    guest = start()
    guest.wait_for_ticks()
    when_begun(daemon, guest.name, phase, lambda command: kill(command.pid), "--emulator", new)
    assert "sevhop recover" in daemon.upgrade(guest.name)["reason"]
    done = daemon.sevhop("recover")
    assert done.returncode == 0, done
    assert guest.state == "running"
    # What the command had begun before it was killed may have come further than the phase.
    possible = {old, new} if phase in ("save", "load", "commit") else {old} if phase in UNDOABLE else {new}
    assert guest.emulator() in {str(path) for path in possible}, done
    guest.wait_for_ticks()
    wait_until(lambda: daemon.left_over() == [], 30, "the keeper exits")
    assert daemon.upgrade(guest.name, "--emulator", new)["outcome"] == "done"
    guest.wait_for_ticks()


@pytest.mark.virtqemud
@pytest.mark.parametrize("rich", [pytest.param(False, marks=pytest.mark.faults), True])
def test_upgraded_guest_is_stopped_without_libvirt(
    daemon: Daemon, start: StartDomain, old: Path, new: Path, rich: bool
) -> None:
    """Its QEMU has a monitor that is ours alone: libvirt may hang from the stop to the transit."""
    guest = start(pflash=rich, balloon="virtio" if rich else "none")
    guest.wait_for_ticks()
    for emulator in (new, old):
        assert daemon.upgrade(guest.name, "--emulator", emulator)["outcome"] == "done"
    with PausedUpgrade.at("stop", guest, new, "--timeout", "5") as upgrade:
        os.kill(daemon.pid_of_libvirtd, signal.SIGSTOP)
        try:
            report = upgrade.finish()
        finally:
            os.kill(daemon.pid_of_libvirtd, signal.SIGCONT)
    assert (report["status"], report["guest_state"]) == (4, "running in the transit"), report
    guest.wait_for_ticks()
    assert daemon.sevhop("recover").returncode == 0
    assert (guest.state, guest.emulator()) == ("running", str(new))
    guest.wait_for_ticks()


@pytest.mark.virtqemud
@pytest.mark.parametrize("phase", some_of(["prepare", "save", "keep"], 2))
def test_guest_runs_after_the_daemon_was_restarted_in_the_first_hop(
    daemon: Daemon, start: StartDomain, old: Path, new: Path, phase: str
) -> None:
    """The hop goes through its monitor. It is completed, or rolled back: the guest does not stay paused."""
    guest = start()
    guest.wait_for_ticks()
    with PausedUpgrade.at(phase, guest, new) as upgrade:
        daemon.restart()
        report = upgrade.finish()
    assert report["outcome"] in ("done", "rolled-back"), report
    assert guest.state == "running"
    assert guest.emulator() == str(new if report["outcome"] == "done" else old)
    guest.wait_for_ticks()


@pytest.mark.virtqemud
def test_domain_whose_guest_is_in_the_transit_is_not_started_beside_it(
    daemon: Daemon, start: StartDomain, new: Path
) -> None:
    """Without a keeper yet: whoever sees a domain that does not answer destroys it, and starts it again."""
    guest = start(transient=True)
    guest.wait_for_ticks()
    described, uuid = daemon.virsh("dumpxml", guest.name), daemon.virsh("domuuid", guest.name)
    when_begun(daemon, guest.name, "keep", lambda command: kill(command.pid), "--emulator", new)
    daemon.virsh("destroy", guest.name)
    (daemon.root / "run/again.xml").write_text(described)
    refused = daemon.run("virsh", "create", "/run/again.xml")
    assert refused.returncode == 1
    assert "its guest runs in the transit" in refused.stderr
    for words in (("check", guest.name), ("check", uuid), ("upgrade", guest.name), ("upgrade", uuid)):
        found = daemon.sevhop(*words)
        assert found.returncode == 1
        assert f"an earlier hop of {guest.name} was interrupted" in found.stderr
        assert f"(run: sevhop recover {guest.name})" in found.stderr
    assert daemon.sevhop("recover", "another").returncode == 1
    assert daemon.run("virsh", "create", "/run/again.xml").returncode == 1
    guest.wait_for_ticks()
    done = daemon.sevhop("recover")
    assert (done.returncode, guest.state, guest.emulator()) == (0, "running", str(new)), done
    guest.wait_for_ticks()


@pytest.mark.virtqemud
def test_upgrade_does_not_wait_for_questions_of_others_to_the_old_qemu(
    daemon: Daemon, start: StartDomain, new: Path
) -> None:
    """As a metrics exporter has them: the QEMU is halted, so there will be no answer."""
    guest = start()
    guest.wait_for_ticks()
    asking = []

    def ask(command: Any) -> None:
        os.kill(command.pid, signal.SIGSTOP)
        asking.append(daemon.start_command("virsh", "domblkstat", guest.name, "vda"))
        wait_until(lambda: "occupied" in daemon.virsh("domcontrol", guest.name), 30, "libvirt waits for the QEMU")
        os.kill(command.pid, signal.SIGCONT)

    status, text = when_begun(daemon, guest.name, "keep", ask, "--emulator", new)
    assert status == 0, text
    assert json.loads(text)["domains"][0]["outcome"] == "done"
    assert asking[0].wait(30) == 1
    asking[0].communicate()
    guest.wait_for_ticks()


@pytest.mark.parametrize("phase", ["finish", "keep"])
def test_paused_guest_is_not_lost_with_its_transit(
    daemon: Daemon, start: StartDomain, old: Path, new: Path, phase: str
) -> None:
    """It has not run there, and its old QEMU is only halted."""
    guest = start()
    guest.wait_for_ticks()
    pid = guest.pid
    daemon.virsh("suspend", guest.name)
    with PausedUpgrade.at(phase, guest, new) as upgrade:
        (transit,) = set(processes_of_domain(guest.name)) - {pid}
        kill(transit)
        report = upgrade.finish()
    assert report["outcome"] in ("recovery-required", "rolled-back"), report
    done = daemon.sevhop("recover")
    assert (done.returncode, guest.state, guest.pid) == (0, "paused", pid), done
    daemon.virsh("resume", guest.name)
    assert_as_before(daemon, guest, old)
    assert daemon.upgrade(guest.name, "--emulator", new)["outcome"] == "done"
    guest.wait_for_ticks()


OF_ITS_OWN = "<interface type='ethernet'><target dev='of-its-own' managed='{}'/><model type='virtio'/></interface>"


@pytest.mark.parametrize("prepared", [False, True])
def test_tap_has_its_own_name_afterwards(
    daemon: Daemon, start: StartDomain, new: Path, old: Path, prepared: bool
) -> None:
    """libvirt makes another of that name while the transit still has the first."""
    guest = start(more=OF_ITS_OWN.format("yes"))
    for emulator in (new, old):
        guest.wait_for_ticks()
        report = daemon.upgrade(guest.name, "--emulator", emulator, *["--prepare"] * prepared)
        assert report["outcome"] == ("prepared" if prepared else "done"), report
        assert any("tap of-its-own is called sevhop" in note for note in report["notes"]), report
        if prepared:
            assert "of-its-own" not in daemon.run("ip", "-brief", "link").stdout
            daemon.virsh("restore", report["image"])
            assert daemon.sevhop("recover").returncode == 0
        else:
            assert len(report["downtimes_ms"]) == 2
        guest.wait_for_ticks()
        links = daemon.run("ip", "-brief", "link").stdout
        assert "of-its-own" in links
        assert "sevhop" not in links
        assert "of-its-own" in daemon.virsh("domiflist", guest.name)
        assert guest.emulator() == str(emulator)


def test_recover_leaves_libvirt_the_name_of_a_tap(daemon: Daemon, start: StartDomain, new: Path) -> None:
    """The upgrade was killed before it did."""
    guest = start(more=OF_ITS_OWN.format("yes"))
    guest.wait_for_ticks()
    when_begun(daemon, guest.name, "retire", lambda command: command.kill(), "--emulator", new)
    assert daemon.sevhop("recover", guest.name).returncode == 0
    guest.wait_for_ticks()
    assert guest.emulator() == str(new)
    assert "of-its-own" in daemon.run("ip", "-brief", "link").stdout


def test_domain_with_a_tap_of_somebody_else_is_upgraded_without(daemon: Daemon, start: StartDomain, new: Path) -> None:
    """Only one QEMU can have it."""
    done = daemon.run("ip", "tuntap", "add", "dev", "of-its-own", "mode", "tap", "vnet_hdr")
    if done.returncode:
        pytest.skip(f"no tap can be made here: {done.stderr.strip()}")
    try:
        guest = start(more=OF_ITS_OWN.format("no"))
        guest.wait_for_ticks()
        report = daemon.upgrade(guest.name, "--emulator", new)
        assert (report["outcome"], report["downtimes_ms"]) == ("done", []), report
        assert any("the tap of-its-own is not libvirt's own" in note for note in report["notes"])
        guest.wait_for_ticks()
    finally:
        assert daemon.run("ip", "link", "delete", "of-its-own").returncode == 0


@pytest.mark.parametrize("phase", PHASES)
def test_interrupted_upgrade_is_rolled_back_or_completed(
    daemon: Daemon, start: StartDomain, old: Path, new: Path, phase: str
) -> None:
    guest = start()
    guest.wait_for_ticks()
    status, out = when_begun(
        daemon, guest.name, phase, lambda command: command.send_signal(signal.SIGINT), "--emulator", new
    )
    report = json.loads(out)["domains"][0]
    if report["outcome"] == "done":
        assert status == 0
        assert guest.emulator() == str(new)
        guest.wait_for_ticks()
    else:
        assert (status, report["outcome"], report["reason"]) == (3, "rolled-back", "interrupted"), out
        assert phase not in IN_TRANSIT or phase in ("load", "commit")
        assert_as_before(daemon, guest, old)
