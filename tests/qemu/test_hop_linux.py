"""A Linux guest hops: its disk, network, memory, firmware and clock go with it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.guests import emulators, linux
from tests.support.guests.machine import I440FX, Q35
from tests.support.guests.running import wait_until

from .conftest import DescribeLinux, StartGuest
from .hops import hop

HOPS = 20


def test_linux_guest_survives_twenty_hops(
    old: Path, new: Path, linux_machine: DescribeLinux, start: StartGuest
) -> None:
    guest = start(linux_machine(rich=True, cpus=2), old)
    guest.wait_for_ticks(10)
    versions = []
    for emulator in itertools.islice(itertools.cycle((new, old)), HOPS):
        versions.append(hop(guest, emulator).destination_version)
        guest.wait_for_ticks(3)
    assert len(set(versions)) == 2
    verdict = guest.stop()
    assert verdict.unharmed, verdict
    assert verdict.writes
    assert verdict.ticks > 3 * HOPS


def test_i440fx_guest_survives_hops(old: Path, new: Path, linux_machine: DescribeLinux, start: StartGuest) -> None:
    guest = start(linux_machine(type=I440FX), old)
    guest.wait_for_ticks(10)
    hop(guest, new)
    hop(guest, old)
    guest.wait_for_ticks(10)
    verdict = guest.stop()
    assert verdict.unharmed, verdict


def test_guest_started_in_the_newest_qemu_hops_to_and_fro(
    emulator: Callable[[str], Path], new: Path, linux_machine: DescribeLinux, start: StartGuest
) -> None:
    """QEMU 11.1 cannot load queues as large as those of a virtio device that was started in 10.0; these are its own."""
    newest = emulator(emulators.UNSTABLE)
    guest = start(linux_machine(), newest)
    guest.wait_for_ticks(10)
    for destination in (new, newest, new):
        hop(guest, destination)
        guest.wait_for_ticks(3)
    verdict = guest.stop()
    assert verdict.unharmed, verdict


@pytest.mark.parametrize("machine_type", [Q35, I440FX])
def test_linux_boots_when_reset_after_a_hop(
    machine_type: str, old: Path, new: Path, linux_machine: DescribeLinux, start: StartGuest
) -> None:
    """SeaBIOS, the option ROM that loads the kernel, and the ACPI tables are there again."""
    guest = start(linux_machine(type=machine_type), old)
    guest.wait_for_ticks(5)
    hop(guest, new)
    guest.execute("system_reset")
    wait_until(lambda: guest.seen().restarts == 1, 60, "the guest boots")
    guest.wait_for_ticks(5)
    verdict = guest.stop()
    assert (verdict.restarts, verdict.disk_errors, verdict.network_errors, verdict.memory_errors) == (1, 0, 0, 0)


def test_uefi_variable_survives_a_hop(old: Path, new: Path, linux_machine: DescribeLinux, start: StartGuest) -> None:
    """
    A variable written shortly before the hop is in the file afterwards, and the firmware finds it after a reset.

    The destination read the file when it started. Had it not got the source's newer copy, it would overwrite it.
    """
    guest = start(linux_machine(uefi=True), old)
    guest.wait_for_line("UEFI 40", timeout=120)
    report = hop(guest, new)
    assert report.destination_version.startswith("10")
    written = linux.uefi_variable(guest.machine.uefi_variables)
    assert written is not None
    assert written >= 40
    hop(guest, old)
    guest.execute("system_reset")
    found = int(guest.wait_for_line("UEFI-FOUND", timeout=120).split()[-1])
    assert found >= written
    verdict = guest.stop()
    assert verdict.restarts == 1
    assert verdict.disk_errors == 0
