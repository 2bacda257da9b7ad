"""Upgrades with one fault, what ``sevhop recover`` makes of them, and what became of the guest."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

from tests.support.faults.operator import Operator
from tests.support.faults.table import Cell
from tests.support.guests.build import ROOT
from tests.support.guests.daemon import Daemon

from ..conftest import NoteFault
from .lived import LivedInDomain


def break_off(
    program: ModuleType,
    daemon: Daemon,
    guest: LivedInDomain,
    emulator: Path,
    point: str,
    fault: str,
    operator: Operator | None = None,
) -> int:
    """
    Upgrade with a fault, and perhaps somebody who does something meanwhile; the exit status.

    :param program: :mod:`.broken_upgrade` or :mod:`.broken_transit`.
    """
    also = [str(operator)] if operator else []
    command = ["env", f"PYTHONPATH={ROOT}", sys.executable, "-m", program.__name__]
    done = daemon.run(*command, guest.name, emulator, point, fault, *also)
    print(done.stdout, done.stderr)
    return done.returncode


def recover_from_failed_step(daemon: Daemon, status: int, point: str, fault: str) -> bool:
    """
    An upgrade in which libvirtd was killed, or a step was refused or not answered: recover, if there is anything to do.

    :param status: exit status of the upgrade.
    :return: whether the guest will start in the same emulator the next time.
    """
    if fault == "daemon":
        daemon.wait_until_it_answers()
    assert status in (0, 3, 4)
    answer = daemon.recover()
    assert answer["status"] == 0, answer
    assert status == 4 or not answer["guests"]
    # A definition that libvirt refuses is only reported.
    return not ("defineXML" in point and fault != "daemon")


def note(
    path: str,
    note_fault: NoteFault,
    daemon: Daemon,
    guest: LivedInDomain,
    point: str,
    fault: str,
    old: Path,
    *,
    defined: bool = True,
) -> None:
    """
    See that the guest runs and lost nothing, that nothing is left, and write that down.

    :param path: how it has hopped.
    :param defined: whether it will start there the next time, too.
    """
    assert guest.state == "running"
    guest.see_unchanged()
    verdict = guest.wait_for_ticks()
    end = "source" if guest.emulator() == str(old) else "destination"
    note_fault(path, point, fault, Cell.running(end, verdict))
    assert (guest.emulator("--inactive") == guest.emulator()) == defined
    assert daemon.left_over() == []
