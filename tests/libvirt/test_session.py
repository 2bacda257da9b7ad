"""The session that an upgrade was started from ends, or is suspended, during the downtime."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.support.guests.daemon import Daemon
from tests.support.guests.running import wait_until

from .conftest import StartDomain
from .holding import PausedUpgrade


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM])
def test_session_that_ends_rolls_the_upgrade_back(
    daemon: Daemon, start: StartDomain, old: Path, new: Path, number: signal.Signals
) -> None:
    guest = start()
    guest.wait_for_ticks()
    pid = guest.pid
    with PausedUpgrade.at("save", guest, new) as upgrade:
        upgrade.interrupt(number)
        report = upgrade.finish()
    assert (report["outcome"], report["status"]) == ("rolled-back", 3), report
    assert (guest.state, guest.pid, guest.emulator()) == ("running", pid, str(old))
    guest.wait_for_ticks()
    wait_until(lambda: daemon.left_over() == [], 30, "the keeper exits")


def test_session_that_is_suspended_does_not_suspend_the_upgrade(daemon: Daemon, start: StartDomain, new: Path) -> None:
    guest = start()
    guest.wait_for_ticks()
    with PausedUpgrade.at("save", guest, new) as upgrade:
        upgrade.interrupt(signal.SIGTSTP)
        report = upgrade.finish()
    assert (report["outcome"], report["status"]) == ("done", 0), report
    assert (guest.state, guest.emulator()) == ("running", str(new))
    guest.wait_for_ticks()
