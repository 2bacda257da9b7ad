"""
SEV and SEV-ES domains are upgraded by way of a transit, and the kernel moves their context twice: into the transit, and
out of it into what libvirt restores. Whoever is killed around the second move, the guest is where its context is.
"""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from sevhop_qmp.process import QemuProcess

from tests.support.guests import emulators, es_counter, real_mode
from tests.support.guests.daemon import Daemon, Description, DomainGuest, kill
from tests.support.guests.running import processes_of_domain, wait_until

from ...libvirt import dying, intercepting
from ...libvirt.transit_guest import kill_keeper_and_supervisor
from ..contract.sev import POLICY_SEV_ES, contexts
from .launch import launch_of

#: Seconds for a step; everything is slow in the lab.
PATIENCE = ("--timeout", "300")
#: Seconds until a moment of an upgrade.
LONG = 1200


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    """A daemon, with sevhop's hook. Starting it and having it probe two QEMUs takes minutes in emulation."""
    with Daemon.installed() as daemon:
        yield daemon


@pytest.fixture
def guest(daemon: Daemon, kernel: str, tmp_path: Path) -> Iterator[DomainGuest]:
    """
    A counting guest in the older emulator; it is destroyed with the test. It is one with SEV-ES unless the kernel is
    the first one: libvirt makes no difference between kernels, and so both kinds are tested side by side.
    """
    es = kernel != "6.1"
    kind = "sev-es" if es else "sev"
    description = Description(
        f"{kind}-{tmp_path.name[-20:]}",
        emulators.emulator(emulators.OLD),
        "kvm",
        32,
        vcpus=2 if es else 1,
        firmware=es_counter.firmware() if es else real_mode.firmware(),
        sev=True,
        policy=POLICY_SEV_ES | 1 if es else 0,
    )
    with ExitStack() as ends:
        guest = DomainGuest.start(daemon, description)
        for path in files(daemon):
            ends.callback(path.unlink, missing_ok=True)
        ends.callback(end_everything, guest)
        guest.wait_for_ticks()
        yield guest
    assert contexts() == []
    assert [name for name in daemon.left_over() if not name.startswith("reboot")] == []


def end_everything(guest: DomainGuest) -> None:
    """Also what a test that failed has left in a transit."""
    kill_keeper_and_supervisor(guest.daemon)
    guest.end()
    for pid in processes_of_domain(guest.name):
        kill(pid)


def files(daemon: Daemon) -> list[Path]:
    """See :mod:`tests.libvirt.intercepting` and :mod:`tests.libvirt.dying`."""
    return [daemon.root / str(path).lstrip("/") for path in (intercepting.REACHED, intercepting.GO, dying.STATES)]


def words(guest: DomainGuest, label: str, *more: str) -> list[str]:
    """An upgrade by way of a transit."""
    emulator = str(emulators.emulator(label))
    return ["upgrade", "--json", guest.name, "--emulator", emulator, *PATIENCE, *more]


def upgrade(guest: DomainGuest, label: str, environment: str = "") -> dict[str, Any]:
    """Upgrade a guest. :param environment: for the command, and the keeper."""
    prefix = ["env", environment] if environment else []
    done = guest.daemon.run(*prefix, sys.executable, "-m", "sevhop.cli", *words(guest, label))
    report: dict[str, Any] = json.loads(done.stdout)["domains"][0]
    print(json.dumps(report, indent=2), done.stderr)
    return report


def runs_in(guest: DomainGuest, label: str, *, adopted: bool = True) -> None:
    """It counts in this emulator, and can hop on. :param adopted: whether it has hopped into it."""
    assert guest.state == "running"
    assert guest.emulator() == guest.emulator("--inactive") == str(emulators.emulator(label))
    guest.wait_for_ticks(5)
    wait_until(lambda: processes_of_domain(guest.name) == [guest.pid], 60, "the transit ends")
    wait_until(lambda: guest.daemon.named("sevhop-keeper") == [], 60, "the keeper exits")
    if adopted:
        status = guest.monitor("x-sev-adopt-status")["return"]
        assert (status["moved"], status["vm-dead"], status["finished"], status["ram"]) == (True, False, True, "shared")
    done = guest.daemon.sevhop("check", guest.name)
    assert done.returncode == 0, done.stdout


def test_guest_changes_its_qemu_by_way_of_a_transit(guest: DomainGuest) -> None:
    """To and fro. libvirt and QEMU report its launch as before."""
    before, context = launch_of(guest), contexts()
    assert before["query-sev"]["state"] == "running"
    for label in (emulators.NEW, emulators.OLD):
        report = upgrade(guest, label)
        assert (report["outcome"], report["notes"]) == ("done", []), report
        assert (report["move"]["errno"], len(report["downtimes_ms"])) == (0, 2)
        runs_in(guest, label)
        assert contexts() == context, "the firmware's guest is the same one"
        assert launch_of(guest) == before


@pytest.mark.one_kernel("6.12")
def test_prepared_guest_runs_in_the_transit_until_any_client_restores_it(guest: DomainGuest) -> None:
    """The transit may lock as much memory as the domain's QEMU could."""
    limit, context = locked(guest.pid), contexts()
    done = guest.daemon.sevhop(*words(guest, emulators.NEW, "--prepare"))
    report = json.loads(done.stdout)["domains"][0]
    assert (report["outcome"], report["in_transit"]) == ("prepared", True), report
    assert guest.state == "shut off"
    guest.wait_for_ticks(5)
    (transit,) = processes_of_domain(guest.name)
    assert locked(transit) == limit
    guest.daemon.virsh("restore", report["image"])
    wait_until(lambda: processes_of_domain(guest.name) == [guest.pid], LONG, "it hops")
    one = guest.daemon.recover_one(guest.name, *PATIENCE)
    assert (one["status"], one["result"], one["detail"]) == (0, "destination", ""), one
    runs_in(guest, emulators.NEW)
    assert contexts() == context

    # Its firmware is private to its first QEMU: a reboot is a cold start.
    guest.daemon.run("virsh", "reset", guest.name)
    wait_until(lambda: contexts() not in ([], context), LONG, "the domain is started again")
    wait_until(lambda: guest.state == "running", LONG, "it runs")


@pytest.mark.long
def test_paused_guest_stays_paused_in_both_hops(guest: DomainGuest) -> None:
    """It is the destination's with the move, without having run there."""
    context = contexts()
    guest.daemon.virsh("suspend", guest.name)
    report = upgrade(guest, emulators.NEW)
    assert (report["outcome"], report["downtime_ms"], report["move"]["errno"]) == ("done", None, 0), report
    assert (guest.state, guest.monitor("query-status")["return"]["status"]) == ("paused", "paused")
    guest.daemon.virsh("resume", guest.name)
    runs_in(guest, emulators.NEW)
    assert contexts() == context


def locked(pid: int) -> tuple[int, int]:
    """How much memory a process may lock, bytes."""
    process = QemuProcess.open(pid)
    try:
        return process.limits[resource.RLIMIT_MEMLOCK]
    finally:
        process.close()


@pytest.mark.faults
@pytest.mark.parametrize(
    ("moment", "kill_it"),
    [("moving", intercepting.KILL_DESTINATION_OF_MOVE), ("ordered", intercepting.KILL_PEER)],
    ids=["moving", "ordered"],
)
def test_guest_stays_in_the_transit_if_the_destination_dies_before_the_move(
    guest: DomainGuest, tmp_path: Path, moment: str, kill_it: str
) -> None:
    """From there it hops into the old emulator. If the move was ordered already, the transit is asked about it."""
    context = contexts()
    environment = intercepting.environment(tmp_path, moment, kill_it)
    report = upgrade(guest, emulators.NEW, environment)
    assert (report["outcome"], report["guest_state"]) == ("rolled-back", "running in the old QEMU"), report
    runs_in(guest, emulators.OLD)
    assert contexts() == context


@pytest.mark.faults
@pytest.mark.parametrize(("moment", "outcome"), [("moving", "rolled-back"), ("moved", "done")])
def test_guest_is_where_its_context_is_if_the_keeper_dies(
    guest: DomainGuest, tmp_path: Path, moment: str, outcome: str
) -> None:
    """The next keeper asks the transit."""
    context = contexts()
    report = upgrade(guest, emulators.NEW, intercepting.environment(tmp_path, moment, intercepting.DIE))
    assert report["outcome"] == outcome, report
    runs_in(guest, emulators.NEW if outcome == "done" else emulators.OLD)
    assert contexts() == context


#: The calls of the first hop after which the command is killed, and the emulator that has the guest in the end.
FIRST_HOP = {
    "before": ("sevhop.engine.hop", "load", emulators.OLD),
    "after": ("sevhop_qmp.move", "move", emulators.NEW),
}


@pytest.mark.faults
@pytest.mark.parametrize("moment", FIRST_HOP)
def test_recover_finds_the_context_after_command_killed_around_the_first_move(
    guest: DomainGuest, tmp_path: Path, moment: str
) -> None:
    daemon, context = guest.daemon, contexts()
    module, call, label = FIRST_HOP[moment]
    environment = dying.after_call(tmp_path, module, call)
    done = daemon.run("env", environment, sys.executable, "-m", "sevhop.cli", *words(guest, emulators.NEW))
    assert done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), done
    done = daemon.sevhop("recover", guest.name, *PATIENCE)
    assert done.returncode == 0, done
    runs_in(guest, label, adopted=label == emulators.NEW)
    assert contexts() == context
    report = upgrade(guest, emulators.NEW)
    assert report["outcome"] == "done", report
    runs_in(guest, emulators.NEW)


@pytest.mark.faults
@pytest.mark.parametrize("moment", ["moving", "moved"])
def test_recover_finds_the_context_without_keeper_and_supervisor(
    guest: DomainGuest, tmp_path: Path, moment: str
) -> None:
    daemon, context = guest.daemon, contexts()
    environment = intercepting.environment(tmp_path, moment, intercepting.WAIT)
    arguments = words(guest, emulators.NEW)
    command = daemon.start_command("env", environment, sys.executable, "-m", "sevhop.cli", *arguments)
    wait_until(files(daemon)[0].exists, LONG, "the moment comes")
    kill_keeper_and_supervisor(daemon)
    ended(command)
    done = daemon.recover_one(guest.name, *PATIENCE)
    assert (done["status"], done["result"], done["detail"]) == (0, "destination", ""), done
    runs_in(guest, emulators.NEW)
    assert contexts() == context


@pytest.mark.faults
def test_recover_ends_a_destination_whose_context_was_lost_with_the_transit(guest: DomainGuest, tmp_path: Path) -> None:
    daemon, source = guest.daemon, guest.pid
    environment = intercepting.environment(tmp_path, "moving", intercepting.WAIT)
    arguments = words(guest, emulators.NEW)
    command = daemon.start_command("env", environment, sys.executable, "-m", "sevhop.cli", *arguments)
    wait_until(files(daemon)[0].exists, LONG, "the moment comes")
    kill_keeper_and_supervisor(daemon)
    ended(command)
    for pid in processes_of_domain(guest.name):
        assert pid != source
        if pid != guest.pid:
            kill(pid)
    done = daemon.sevhop("recover", guest.name, *PATIENCE)
    assert (done.returncode, "it was in the transit, which has exited" in done.stdout) == (5, True), done
    assert guest.state == "shut off"


def ended(command: subprocess.Popen[str]) -> None:
    """It cannot finish without a keeper."""
    out, err = command.communicate(timeout=LONG)
    assert command.returncode == 4, (out, err)
