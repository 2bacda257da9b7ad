"""Hops outside libvirt that are interrupted, and the state of the guest afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sevhop.records import journal

from tests.support.faults import broken_hop
from tests.support.faults.operator import Operator
from tests.support.faults.table import Cell
from tests.support.guests.build import ROOT
from tests.support.guests.running import Guest, processes_of

from ..conftest import NoteFault
from .hops import sevhop
from .lived import LivedInGuest


def interrupt_hop(
    guest: Guest,
    emulator: Path,
    point: str,
    fault: str,
    operator: Operator | None = None,
    *,
    program: Sequence[str] = ("-m", broken_hop.__name__),
) -> int:
    """
    Hop with a fault, and perhaps somebody who does something meanwhile.

    :param program: what to run, as arguments of Python.
    :return: the exit status of the hop.
    """
    command = [sys.executable, *program, str(guest.machine.monitor), str(emulator), point, fault]
    command += [str(operator)] if operator else []
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, env=environment, timeout=300, check=False).returncode


def recover(*names: str) -> dict[str, Any]:
    """Run ``sevhop recover``; its JSON, and its exit status."""
    done = sevhop("recover", "--json", *names)
    assert done.stderr == "", done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer | {"status": done.returncode}


def note(note_fault: NoteFault, path: str, guest: Guest, point: str, fault: str, end: str, remark: str = "") -> None:
    """Verify that the guest runs once and lost nothing, and record that."""
    (process,) = processes_of(guest.machine.directory)
    assert os.sched_getscheduler(process) == os.sched_getscheduler(0)
    if isinstance(guest, LivedInGuest):
        guest.see_unchanged()
    verdict = guest.wait_for_ticks(3)
    note_fault(path, point, fault, Cell.running(end, verdict, remark))
    assert verdict.unharmed, verdict
    assert not list(journal.journals())
