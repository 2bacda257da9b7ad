"""
Hops of SEV-ES guests as far as QEMU itself has a part in them: the flag for which it leaves vCPU state alone.

The kernel's part is played (see fake_sev_kernel.c), and nothing is encrypted, so the guest runs as any other; that a
real one does is tested in the lab.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from sevhop.checks import registers, sev_host
from sevhop.errors import RolledBack
from sevhop_qmp import exported
from sevhop_qmp.process import QemuProcess
from sevhop_qmp.protected_state import ProtectedState

from tests.support.guests import emulators, real_mode
from tests.support.guests.build import ROOT
from tests.support.guests.machine import Accelerator, Machine
from tests.support.guests.running import Guest

from .adopting import sev_guest
from .hops import HopDriver, ObservedHop, kill_destination
from .interrupted import recover

#: Starts an SEV-ES guest in a QEMU.
StartEs = Callable[[str], Guest]

WITH_FLAG = (emulators.NEW, emulators.UNSTABLE)


@pytest.fixture
def start_es(
    kvm: Accelerator,
    tmp_path: Path,
    fake_kernel: str,
    c_bit: int,
    emulator: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[StartEs]:
    monkeypatch.setattr(sev_host, "examine", lambda *_, **__: [])
    machine = Machine(
        tmp_path,
        accelerator=kvm,
        memory_mib=32,
        bios=real_mode.firmware(),
        cpus=2,
        more=tuple(sev_guest(c_bit, "sev-es")),
    )
    with ExitStack() as guests:

        def start(label: str) -> Guest:
            with monkeypatch.context() as source:
                source.setenv("LD_PRELOAD", fake_kernel)
                source.setenv("FAKE_SEV_LAUNCH", "1")
                guest = guests.enter_context(Guest.start(machine, emulator(label)))
            guest.wait_for_ticks(5)
            return guest

        yield start


def flag_of(pid: int, label: str) -> int | None:
    """The flag of a QEMU, whose program was started for it once; None if there is none."""
    process = QemuProcess.open(pid)
    try:
        offset = registers._offsets.get(exported.build_id(process))
        assert bool(offset) == (label in WITH_FLAG)
        if not offset:
            return None
        with ProtectedState(process, offset) as flag:
            return flag.protected()
    finally:
        process.close()


@pytest.mark.parametrize(
    "labels",
    [
        (emulators.OLD, emulators.NEW, emulators.OLD),
        (emulators.NEW, emulators.UNSTABLE, emulators.NEW),
    ],
    ids="-".join,
)
def test_source_saves_all_vcpu_state(
    labels: tuple[str, ...], start_es: StartEs, emulator: Callable[[str], Path]
) -> None:
    guest = start_es(labels[0])
    for before, after in itertools.pairwise(labels):
        seen: list[Any] = []

        def look(hop: ObservedHop, label: str = before, seen: list[Any] = seen) -> None:
            seen.append(flag_of(hop.report.source_pid, label))

        report = HopDriver().run(guest, emulator(after), at="map", fault=look)
        assert (report.outcome, report.context) == ("done", "sev-es")
        assert seen == [0 if before in WITH_FLAG else None], "cleared before the state is saved"
        guest.wait_for_ticks(5)
    assert guest.stop().unharmed


def test_destination_can_hop_again(start_es: StartEs, emulator: Callable[[str], Path]) -> None:
    """adopt.so sets the flag again when the hop is over: QEMU is what it would be without a hop."""
    guest = start_es(emulators.NEW)
    for _ in range(2):
        HopDriver().run(guest, emulator(emulators.NEW))
        assert flag_of(guest.pid, emulators.NEW) == 1
    guest.wait_for_ticks(5)
    assert guest.stop().unharmed


def test_flag_is_set_again_by_a_rollback(start_es: StartEs, emulator: Callable[[str], Path]) -> None:
    guest = start_es(emulators.NEW)
    pid = guest.pid
    seen: list[Any] = []

    def fail(hop: ObservedHop) -> None:
        seen.append(flag_of(hop.report.source_pid, emulators.NEW))
        kill_destination(hop)

    with pytest.raises(RolledBack):
        HopDriver().run(guest, emulator(emulators.NEW), at="commit", fault=fail)
    assert (guest.pid, seen) == (pid, [0])
    assert flag_of(pid, emulators.NEW) == 1
    guest.wait_for_ticks(5)
    assert guest.stop().unharmed


#: A hop that is killed when a phase begins, on a host that would be refused.
_KILLED = """
import sys
from sevhop.checks import sev_host
sev_host.examine = lambda *_, **__: []
from tests.support.faults import broken_hop
broken_hop.main(*sys.argv[1:5])
"""


@pytest.mark.parametrize("point", ["phase map", "phase load"])
def test_flag_is_set_again_by_a_recovery(point: str, start_es: StartEs, emulator: Callable[[str], Path]) -> None:
    guest = start_es(emulators.NEW)
    pid, seen = guest.pid, list[Any]()
    path = str(emulator(emulators.NEW))
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, guest.machine.monitor, path, point, "command"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    (one,) = recover()["guests"]
    assert one["result"] == "source"
    # The check of the next hop verifies it, too.
    HopDriver().run(
        guest, emulator(emulators.NEW), at="prepare", fault=lambda _: seen.append(flag_of(pid, emulators.NEW))
    )
    guest.wait_for_ticks(5)
    assert seen == [1]
    assert guest.stop().unharmed
