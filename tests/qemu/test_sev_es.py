"""
Hops of SEV-ES guests as far as QEMU itself has a part in them: the flag for which it leaves vCPU state alone.

The kernel's part is played (see fake_sev_kernel.c), and nothing is encrypted, so the guest runs as any other; that a
real one does is tested in the lab.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from sevhop.checks import registers
from sevhop.errors import RolledBack
from sevhop_qmp import exported
from sevhop_qmp.errors import SevhopError
from sevhop_qmp.monitor import Monitor
from sevhop_qmp.process import QemuProcess
from sevhop_qmp.protected_state import ProtectedState

from tests.support.guests import emulators
from tests.support.guests.running import wait_ended

from .conftest import StartEs
from .hops import HopDriver, ObservedHop, kill_destination, observe_commands
from .protected import reboot_action_of

WITH_FLAG = (emulators.NEW, emulators.UNSTABLE)


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


def test_flag_and_reboot_action_are_set_again_by_a_rollback(start_es: StartEs, emulator: Callable[[str], Path]) -> None:
    guest = start_es(emulators.NEW)
    pid = guest.pid
    seen: list[Any] = []

    def fail(hop: ObservedHop) -> None:
        seen.append(flag_of(hop.report.source_pid, emulators.NEW))
        assert reboot_action_of(pid) == "shutdown"
        kill_destination(hop)

    with pytest.raises(RolledBack):
        HopDriver().run(guest, emulator(emulators.NEW), at="commit", fault=fail)
    assert (guest.pid, seen) == (pid, [0])
    assert flag_of(pid, emulators.NEW) == 1
    assert reboot_action_of(pid) == "reset"
    guest.wait_for_ticks(5)
    assert guest.stop().unharmed


def test_guest_that_reboots_before_the_stop_ends_as_without_a_hop(
    start_es: StartEs, emulator: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the flag is cleared QEMU would reset it instead, and go on with a guest whose registers it cannot set."""
    guest = start_es(emulators.NEW)
    pid = guest.pid
    execute = Monitor.execute
    cleared: list[bool] = []

    async def reboot_first(self: Monitor, command: str, *arguments: Any, **options: Any) -> Any:
        if command == "stop" and not cleared:
            cleared.append(flag_of(pid, emulators.NEW) == 0)
            await execute(self, "system_reset")
        return await execute(self, command, *arguments, **options)

    monkeypatch.setattr(Monitor, "execute", reboot_first)
    with pytest.raises(SevhopError):
        HopDriver().run(guest, emulator(emulators.NEW))
    assert cleared == [True]
    assert wait_ended(pid, 10)


def test_context_moves_when_the_source_is_halted(
    start_es: StartEs, emulator: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest whose context moves while it runs would lose the state of its vCPUs."""
    guest = start_es(emulators.NEW)
    driver = HopDriver()
    halted: list[bool] = []

    def look(command: str, _: Mapping[str, object]) -> None:
        if command == "x-sev-migrate-from":
            process = QemuProcess.open(driver.hop.report.source_pid)
            halted.append(process.frozen)
            process.close()

    observe_commands(monkeypatch, look)
    assert driver.run(guest, emulator(emulators.NEW)).outcome == "done"
    assert halted == [True]
    guest.wait_for_ticks(5)
    assert guest.stop().unharmed
