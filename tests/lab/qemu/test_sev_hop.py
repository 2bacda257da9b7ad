"""
SEV guests hop, and the kernel itself moves their context.

``HERE`` is this test's QEMU, Debian's own; ``THERE`` is that of another Debian release. That the move itself does what
it has to on every kernel, and is refused and retried as it should be, is seen without QEMU in tests/lab/contract.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import re
import signal
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from sevhop.checks import guest as guest_checks
from sevhop.checks import sev_host
from sevhop.checks.result import CheckResult, Status
from sevhop.engine import commit
from sevhop.engine.check import Checked
from sevhop.errors import Refused, RolledBack
from sevhop.guest.inspection import inspect
from sevhop.report import Report
from sevhop_qmp.errors import MonitorClosed
from sevhop_qmp.monitor import Monitor
from sevhop_qmp.move import MoveReport
from sevhop_qmp.process import QemuProcess

from tests.support.guests import emulators
from tests.support.guests.machine import C_BIT
from tests.support.guests.running import Guest, wait_ended

from ...qemu.hops import Fault, HopDriver, ObservedHop, kill_destination, kill_source
from ..contract.kvm import Vm
from ..contract.sev import contexts
from .competitor import Competitor
from .conftest import DescribeSev, StartGuest

#: Seconds for a step; everything is slow in the lab.
PATIENCE = 60.0
CGROUPS = Path("/sys/fs/cgroup")


@pytest.fixture
def here() -> Path:
    return emulators.emulator(emulators.OLD)


@pytest.fixture
def there() -> Path:
    return emulators.emulator(emulators.NEW)


@pytest.fixture
def guest(sev_machine: DescribeSev, start: StartGuest) -> Guest:
    """A counting SEV guest."""
    guest = start(sev_machine())
    guest.wait_for_ticks(10)
    return guest


def hop(guest: Guest, emulator: Path, **options: object) -> Report:
    """Hop a guest, with time enough."""
    return HopDriver().run(guest, emulator, timeout=PATIENCE, start_timeout=120, **options)  # type: ignore[arg-type]


def hop_rolled_back(guest: Guest, emulator: Path, fault: Fault, reason: str, at: str = "commit") -> None:
    """Hop a guest, which fails for this reason; the guest keeps running where it was."""
    pid = guest.pid
    with pytest.raises(RolledBack, match=reason):
        hop(guest, emulator, at=at, fault=fault)
    assert guest.pid == pid
    guest.wait_for_ticks(10)
    assert guest.seen().unharmed
    (context,) = contexts()
    assert guest.execute("query-sev")["handle"] == context.handle


def memory_inode(pid: int) -> tuple[str, int]:
    """Where the pages of a guest are. Without encryption only this distinguishes shared from copied."""
    process = QemuProcess.open(pid)
    try:
        (mapping,) = (m for m in process.mappings() if m.path.startswith("/memfd:memory-backend-memfd"))
        assert mapping.shared
        return mapping.device, mapping.inode
    finally:
        process.close()


def test_sev_guest_hops_there_and_back_and_there(
    sev_machine: DescribeSev, start: StartGuest, here: Path, there: Path
) -> None:
    guest = start(sev_machine(policy=1))
    guest.wait_for_ticks(10)
    (before,) = contexts()
    pages = memory_inode(guest.pid)
    for emulator in (there, here, there):
        source = QemuProcess.open(guest.pid)
        report = hop(guest, emulator)
        assert report.context == "sev"
        assert report.move is not None
        assert (report.move.errno, report.move.attempts) == (0, 1)
        assert not report.notes
        assert not source.alive
        source.close()
        sev = guest.execute("query-sev")
        assert (sev["enabled"], sev["state"], sev["policy"]) == (True, "running", 1)
        (context,) = contexts()
        assert context == before, "the firmware's guest is the same one"
        assert memory_inode(guest.pid) == pages
        guest.wait_for_ticks(10)
    verdict = guest.stop()
    assert verdict.unharmed, verdict


def test_old_qemu_cannot_run_the_guest_any_more(
    sev_machine: DescribeSev, start: StartGuest, there: Path, tmp_path: Path
) -> None:
    second = tmp_path / "second.sock"
    guest = start(sev_machine(more=("-qmp", f"unix:{second},server=on,wait=off")))
    guest.wait_for_ticks(10)
    ended = []

    async def run_it(pid: int) -> None:
        os.kill(pid, signal.SIGCONT)  # sevhop has halted it, and the kernel has to refuse all the same
        async with await Monitor.connect(second, timeout=PATIENCE) as monitor:
            # It succeeds, and then its first KVM_RUN fails.
            with contextlib.suppress(MonitorClosed):
                await monitor.execute("cont")

    def run_old(hop: ObservedHop) -> None:
        thread = threading.Thread(target=lambda: asyncio.run(run_it(hop.report.source_pid)))
        thread.start()
        thread.join()
        ended.append(wait_ended(hop.report.source_pid, PATIENCE))

    hop(guest, there, at="finish", fault=run_old)
    assert ended == [True], "KVM refuses to run it, so QEMU aborts"
    assert "KVM_SET_" in guest.said() or "kvm run failed" in guest.said() or "Input/output error" in guest.said()
    guest.wait_for_ticks(10)
    verdict = guest.stop()
    assert verdict.unharmed, verdict


@pytest.mark.one_kernel("6.1")
def test_destination_that_did_not_adopt_cannot_run(guest: Guest, there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def skip_the_move(_: ObservedHop) -> None:
        monkeypatch.setattr(Checked, "autostart", False)
        monkeypatch.setattr(Checked, "has_context", False)

    hop_rolled_back(
        guest,
        there,
        skip_the_move,
        r"the new QEMU exited: sevhop adopt: this QEMU must not run: the guest's SEV context is still the old QEMU's",
    )


# -- around the commit -----------------------------------------------------------------------------


@pytest.mark.one_kernel("6.1")
def test_guest_survives_source_killed_before_commit(guest: Guest, there: Path) -> None:
    report = hop(guest, there, at="commit", fault=kill_source)
    assert report.outcome == "done"
    guest.wait_for_ticks(10)
    assert guest.stop().unharmed


@pytest.mark.one_kernel("6.12")
def test_hop_is_rolled_back_if_destination_killed_before_commit(guest: Guest, there: Path) -> None:
    hop_rolled_back(guest, there, kill_destination, "the new QEMU exited")


@pytest.mark.one_kernel("6.12")
def test_guest_survives_destination_killed_after_commit(guest: Guest, there: Path) -> None:
    """Only its VM is left, in our hands, with the context in it: a third QEMU adopts it."""
    victims = []

    def kill(hop: ObservedHop) -> None:
        victims.append(hop.report.destination_pid)
        kill_destination(hop)

    report = hop(guest, there, at="resume", fault=kill)
    assert report.outcome == "done"
    assert report.destination_pid not in victims
    assert any("retrying in another process" in note for note in report.notes)
    guest.wait_for_ticks(10)
    assert guest.execute("query-sev")["state"] == "running"
    assert guest.stop().unharmed


@pytest.mark.one_kernel("6.1")
def test_kernel_refuses_what_is_not_the_source(guest: Guest, there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    move = commit._move
    with Vm() as other, open(os.devnull, "rb") as file:
        for descriptor, reason in ((other.descriptor, "EINVAL"), (file.fileno(), "EBADF")):

            async def move_from(*arguments: Any, source_vm_fd: int, exchanged: int = descriptor) -> MoveReport:
                return await move(*arguments, source_vm_fd=exchanged)

            monkeypatch.setattr(commit, "_move", move_from)
            hop_rolled_back(guest, there, lambda _: None, reason)


@pytest.mark.one_kernel("6.12")
def test_typed_vm_is_refused(sev_machine: DescribeSev, there: Path) -> None:
    """A VM of the new kind could be moved and would never run again. Linux 6.1 has no VM type for SEV."""
    typed = f"sev-guest,id=sev,cbitpos={C_BIT},reduced-phys-bits=1,policy=0,legacy-vm-type=off"
    more = ("-object", typed, "-machine", "confidential-guest-support=sev")
    with Guest.start(dataclasses.replace(sev_machine(), sev_policy=None, more=more), there) as guest:
        guest.wait_for_ticks(10)
        pid = guest.pid
        driver = HopDriver()
        with pytest.raises(Refused, match=r"VM type: made by KVM_SEV_INIT2"):
            driver.run(guest, there, timeout=PATIENCE, start_timeout=120)
        assert driver.phases == ["check"]
        assert guest.pid == pid
        guest.wait_for_ticks(10)


def host_as_checked(
    guest: Guest, emulator: Path, *, own_group: re.Pattern[str] | None = None
) -> dict[str, CheckResult]:
    """What is found of the host."""

    pid = guest.pid

    async def look() -> dict[str, CheckResult]:
        process = QemuProcess.open(pid)
        try:
            async with await Monitor.connect(guest.machine.monitor, timeout=PATIENCE) as monitor:
                tree = (await guest_checks.standalone(monitor, process, str(emulator))).tree
                assert tree.failures() == []
                described = await inspect(monitor, process)
            (context,) = (one for one in tree.children if one.name == "context")
            assert [one.name for one in context.children] == [*sev_host.NAMES, "reboot"]
            again = sev_host.examine(described, process, own_group=own_group, sandbox=False)
            return {one.name: one for one in again}
        finally:
            process.close()

    return asyncio.run(look())


@pytest.mark.one_kernel("6.1")
def test_check_probes_the_host(guest: Guest, there: Path) -> None:
    found = host_as_checked(guest, there)
    assert {one.status for one in found.values()} == {Status.PASS}
    assert found["kvm_amd"].detail == "sev=Y"
    assert found["device"].detail == "/dev/sev"


def test_check_sees_that_there_is_no_room_for_another_context(guest: Guest, there: Path) -> None:
    """As libvirt would have it: a group for all guests, and in it one for each."""
    outer = CGROUPS / "machine"
    inner = outer / "qemu-1-guest.libvirt-qemu"
    inner.mkdir(parents=True)
    try:
        (inner / "cgroup.procs").write_text(str(guest.pid))
        own = sev_host.DOMAIN_GROUP
        assert host_as_checked(guest, there, own_group=own)["ASID"].status is Status.PASS
        (outer / "misc.max").write_text("sev 0")
        finding = host_as_checked(guest, there, own_group=own)["ASID"]
        assert finding.status is Status.FAIL
        assert "cgroup /machine: sev 0 of 0 in use" in finding.detail
    finally:
        (CGROUPS / "cgroup.procs").write_text(str(guest.pid))
        inner.rmdir()
        outer.rmdir()


# -- busy ------------------------------------------------------------------------------------------


@pytest.mark.one_kernel("6.1")
def test_move_is_retried_while_busy(guest: Guest, there: Path) -> None:
    logger = logging.getLogger("sevhop_qmp.move")

    with ExitStack() as stack:

        def compete(hop: ObservedHop) -> None:
            assert hop.acquired.handles.source_vm_fd is not None
            competitor = stack.enter_context(Competitor(hop.acquired.handles.source_vm_fd))
            attempts = []

            def count(record: logging.LogRecord) -> bool:
                attempts.append(record)
                if len(attempts) == 3:
                    competitor.give_up()
                return True

            logger.addFilter(count)
            stack.callback(logger.removeFilter, count)

        before = logger.level
        logger.setLevel(logging.INFO)
        stack.callback(logger.setLevel, before)
        report = hop(guest, there, at="commit", fault=compete, move_deadline=30.0)
    assert report.move is not None
    assert report.move.errno == 0
    assert report.move.attempts > 3
    guest.wait_for_ticks(10)
    assert guest.stop().unharmed


@pytest.mark.one_kernel("6.12")
def test_hop_is_rolled_back_if_busy_for_too_long(guest: Guest, there: Path) -> None:
    """The competing move also blocks the source's vCPUs, so the guest runs again when that one has given up."""
    threads = []

    with ExitStack() as stack:

        def compete(hop: ObservedHop) -> None:
            assert hop.acquired.handles.source_vm_fd is not None
            competitor = stack.enter_context(Competitor(hop.acquired.handles.source_vm_fd))

            def end() -> None:
                assert wait_ended(hop.report.destination_pid, PATIENCE)
                competitor.give_up()

            threads.append(threading.Thread(target=end))
            threads[0].start()
            stack.callback(threads[0].join)

        pid = guest.pid
        with pytest.raises(RolledBack, match=r"EBUSY.*given up after \d+ attempts"):
            hop(guest, there, at="commit", fault=compete, move_deadline=0.5)
    assert guest.pid == pid
    guest.wait_for_ticks(10)
    assert guest.stop().unharmed


@pytest.mark.one_kernel("6.1")
def test_full_misc_cgroup_is_named(guest: Guest, there: Path) -> None:
    group = CGROUPS / "full"
    group.mkdir()
    try:
        (group / "misc.max").write_text("sev 0")

        def confine(hop: ObservedHop) -> None:
            (group / "cgroup.procs").write_text(str(hop.report.destination_pid))

        hop_rolled_back(guest, there, confine, r"no SEV ASID is left: cgroup /full: sev 0 of 0 in use; raise misc\.max")
    finally:
        group.rmdir()
