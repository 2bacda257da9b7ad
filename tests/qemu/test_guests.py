"""The guests themselves, without a hop: each runs on each QEMU and reports when it is harmed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.guests import counter, emulators
from tests.support.guests.judge import judge
from tests.support.guests.machine import I440FX, Q35
from tests.support.guests.running import Guest

from .conftest import DescribeCounter, DescribeLinux, StartGuest

BOTH = pytest.mark.parametrize("label", [emulators.OLD, emulators.NEW])


def guest_memory(guest: Guest) -> Path:
    """The guest's memory as a file: the memfd that its QEMU holds."""
    for entry in os.scandir(f"/proc/{guest.pid}/fd"):
        if os.readlink(entry.path).startswith("/memfd:memory-backend-memfd"):
            return Path(entry.path)
    raise AssertionError("no memfd")


@BOTH
@pytest.mark.parametrize("machine_type", [Q35, I440FX])
def test_counter_counts_in_its_memory(
    label: str,
    machine_type: str,
    emulator: Callable[[str], Path],
    counter_machine: DescribeCounter,
    start: StartGuest,
) -> None:
    guest = start(counter_machine(type=machine_type), emulator(label))
    guest.wait_for_ticks(20)
    with open(guest_memory(guest), "rb") as memory:
        first, second = (int.from_bytes(os.pread(memory.fileno(), 8, counter.COUNTER), "little") for _ in range(2))
        assert 0 < first <= second
        assert os.pread(memory.fileno(), 4, counter.MAGIC_AT) == counter.MAGIC.to_bytes(4, "little")
    verdict = guest.stop()
    assert verdict.unharmed, verdict


def test_counter_notices_foreign_memory(old: Path, counter_machine: DescribeCounter, start: StartGuest) -> None:
    guest = start(counter_machine(), old)
    guest.wait_for_ticks(5)
    with open(guest_memory(guest), "r+b") as memory:
        # A page that it comes to soon: it checks one with each line.
        page = counter.PATTERN + (guest.seen().last + 50) * 4096
        os.pwrite(memory.fileno(), b"not the guest's", page + 1234 // 4 * 4)
    guest.wait_for_line("BAD ", timeout=30)
    assert guest.log().count(f"BAD {page + 1232:08x}") == 1
    verdict = guest.stop()
    assert verdict.memory_errors == 1
    assert not verdict.unharmed


def test_counter_notices_a_restart(old: Path, counter_machine: DescribeCounter, start: StartGuest) -> None:
    guest = start(counter_machine(), old)
    guest.wait_for_ticks(5)
    guest.execute("system_reset")
    guest.wait_for_ticks(5)
    verdict = guest.stop()
    assert verdict.restarts == 1
    assert not verdict.ticks_repeated


def test_rich_machine_runs(old: Path, counter_machine: DescribeCounter, start: StartGuest) -> None:
    guest = start(counter_machine(rich=True, network=True, disk_mib=16), old)
    guest.wait_for_ticks(5)
    assert guest.execute("query-status")["running"]


@BOTH
@pytest.mark.parametrize("machine_type", [Q35, I440FX])
def test_linux_uses_disk_network_and_memory(
    label: str,
    machine_type: str,
    emulator: Callable[[str], Path],
    linux_machine: DescribeLinux,
    start: StartGuest,
) -> None:
    guest = start(linux_machine(type=machine_type), emulator(label))
    guest.wait_for_ticks(30)
    verdict = guest.stop()
    assert verdict.unharmed, verdict
    assert verdict.writes


def test_linux_disk_is_really_judged(old: Path, linux_machine: DescribeLinux, start: StartGuest) -> None:
    guest = start(linux_machine(), old)
    guest.wait_for_ticks(10)
    guest.stop()
    with guest.machine.serial.open("a", encoding="ascii") as log:
        last = guest.seen().last + 3
        log.write(f"TICK {last} w=0 r={last} ping=0 mem=0\n")
    verdict = judge(guest.machine)
    assert verdict.ticks_lost == 2
    assert verdict.disk_errors >= 2  # the guest may have written one more than it reported
