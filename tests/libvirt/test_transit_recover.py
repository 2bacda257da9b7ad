"""``sevhop recover`` for a domain whose guest runs in the transit."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.guests.daemon import Daemon, kill
from tests.support.guests.running import wait_until

from . import intercepting
from .conftest import StartDomain
from .transit_guest import KEEPER, TransitGuest, kill_keeper_and_supervisor, measured


def test_recover_restores_the_domain(daemon: Daemon, transit: TransitGuest, new: Path, record_property: Any) -> None:
    with measured(transit, record_property):
        transit.enter(new)
        status = daemon.sevhop("status").stdout
        assert f"the guest runs in the transit (QEMU 10.0.13, process {transit.transit})" in status, status
        done = daemon.sevhop("recover")
        assert (done.returncode, "runs in the new QEMU" in done.stdout) == (0, True), done
        transit.assert_arrived(new)


def test_recover_leaves_a_guest_that_waits_on_purpose(
    daemon: Daemon, transit: TransitGuest, new: Path, record_property: Any
) -> None:
    """Any client's restore has it hop; what is left is done by recover."""
    with measured(transit, record_property):
        transit.enter(new)
        (journal,) = (daemon.root / "var/lib/sevhop/journal").iterdir()
        lines = journal.read_bytes().partition(b"\0")[0]
        journal.write_bytes(lines + b'{"phase": "prepared"}\n')
        done = daemon.sevhop("recover")
        assert f"hop in progress: runs in the transit; to finish: virsh restore {transit.image}" in done.stdout, done
        transit.assert_in_transit()
        daemon.virsh("restore", transit.image)
        transit.assert_arrived(new)


def test_recover_does_not_resume_a_state_that_is_outdated(
    daemon: Daemon, transit: TransitGuest, new: Path, tmp_path: Path
) -> None:
    """The guest has hopped, but the transit was not ended, and the new QEMU has exited since: it is not in both."""
    transit.enter(new, environment=intercepting.environment(tmp_path, "arrived", intercepting.WAIT))
    transit.restore().communicate(timeout=60)
    reached = daemon.root / str(intercepting.REACHED).lstrip("/")
    wait_until(reached.exists, 60, "the guest has hopped")
    kill_keeper_and_supervisor(daemon)
    daemon.virsh("destroy", transit.guest.name)
    done = daemon.sevhop("recover")
    assert done.returncode == 5, done
    assert "it ran in the new QEMU, which has exited" in done.stdout
    assert transit.transit not in daemon.processes()


@pytest.mark.parametrize("moment", ["transit", "met", "stopped", "arrived"])
def test_recover_finds_the_guest_without_keeper_and_supervisor(
    daemon: Daemon, transit: TransitGuest, new: Path, tmp_path: Path, moment: str
) -> None:
    environment = "" if moment == "transit" else intercepting.environment(tmp_path, moment, intercepting.WAIT)
    transit.enter(new, environment=environment)
    if moment != "transit":
        transit.restore().communicate(timeout=60)
        reached = daemon.root / str(intercepting.REACHED).lstrip("/")
        wait_until(reached.exists, 60, "the moment comes")
    kill_keeper_and_supervisor(daemon)
    if moment != "arrived":
        status = daemon.sevhop("status").stdout
        assert f"the guest runs in the transit (process {transit.transit}), without a keeper" in status, status
        if moment == "transit":
            refused = daemon.run("virsh", "start", transit.guest.name)
            assert f"its guest runs in the transit (process {transit.transit})" in refused.stderr
    done = daemon.sevhop("recover")
    assert (done.returncode, "runs in the new QEMU" in done.stdout) == (0, True), done
    transit.assert_arrived(new)


def halt_at(moment: str, daemon: Daemon, transit: TransitGuest, new: Path, tmp_path: Path) -> None:
    """The second hop waits there."""
    transit.enter(new, environment=intercepting.environment(tmp_path, moment, intercepting.WAIT))
    transit.restore().communicate(timeout=60)
    reached = daemon.root / str(intercepting.REACHED).lstrip("/")
    wait_until(reached.exists, 60, "the moment comes")


@pytest.mark.parametrize("moment", ["met", "stopped"])
def test_recover_ends_a_destination_that_waits_for_a_transit_that_is_gone(
    daemon: Daemon, transit: TransitGuest, new: Path, tmp_path: Path, moment: str
) -> None:
    """The guest is lost with the transit. Whoever waits for it is not the guest."""
    halt_at(moment, daemon, transit, new, tmp_path)
    kill_keeper_and_supervisor(daemon)
    kill(transit.transit)
    done = daemon.sevhop("recover")
    assert (done.returncode, "it was in the transit, which has exited" in done.stdout) == (5, True), done
    wait_until(lambda: transit.guest.state == "shut off", 30, "the destination exits")
    wait_until(lambda: daemon.left_over() == [], 30, "nothing is left")


_NO_KEEPER = """
import signal
import sys

if "sevhop.transit_keeper.main" in " ".join(sys.orig_argv):
    import sevhop.keeper.main as module
    from sevhop_qmp.errors import SevhopError

    def keep(*arguments):
        raise SevhopError("refused for a test")

    module._keep = keep
"""


def test_domain_is_not_started_beside_a_guest_that_nobody_keeps(
    daemon: Daemon, start: StartDomain, new: Path, tmp_path: Path
) -> None:
    """Its keeper could not be started, neither by the upgrade nor by a recovery."""
    (tmp_path / "sitecustomize.py").write_text(_NO_KEEPER)
    environment = f"PYTHONPATH={tmp_path}"
    guest = start()
    guest.wait_for_ticks()
    command = ["env", environment, sys.executable, "-m", "sevhop.cli"]
    done = daemon.run(*command, "upgrade", guest.name, "--emulator", new)
    assert (done.returncode, "refused for a test" in done.stderr) == (4, True), done
    # Whoever sees a domain that does not answer destroys it, and starts it again.
    daemon.virsh("destroy", guest.name)
    for _ in range(2):
        refused = daemon.run("virsh", "start", guest.name)
        assert (refused.returncode, "its guest runs in the transit" in refused.stderr) == (1, True), refused
        guest.wait_for_ticks()
        assert daemon.run(*command, "recover").returncode == 4
    done = daemon.sevhop("recover")
    assert (done.returncode, guest.state, guest.emulator()) == (0, "running", str(new)), done
    guest.wait_for_ticks()
    wait_until(lambda: daemon.left_over() == [], 30, "nothing is left")


@pytest.mark.parametrize("moment", ["met", "stopped"])
def test_recover_does_not_act_beside_a_keeper_that_hangs(
    daemon: Daemon, transit: TransitGuest, new: Path, tmp_path: Path, moment: str
) -> None:
    """It has the guest, and goes on with its hop when it does not hang any more."""
    halt_at(moment, daemon, transit, new, tmp_path)
    (keeper,) = daemon.named(KEEPER)
    kill(keeper, signal.SIGSTOP)
    try:
        done = daemon.sevhop("recover", "--timeout", "2")
        assert (done.returncode, "did not reply" in done.stdout) == (4, True), done
    finally:
        (daemon.root / str(intercepting.GO).lstrip("/")).touch()
        kill(keeper, signal.SIGCONT)
    transit.assert_arrived(new)
