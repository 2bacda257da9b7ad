"""Guests with other memory than one small memfd: what of it hops, and what is refused."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from bench.downtime import memory_of
from sevhop_qmp import ram_blocks
from sevhop_qmp.monitor import Commands, Monitor
from sevhop_qmp.process import MemoryMapping, QemuProcess
from sevhop_qmp.ram_block_table import parse_ramblock_table

from tests.support.guests import counter, host_memory
from tests.support.guests.build import Unavailable
from tests.support.guests.machine import Machine
from tests.support.guests.running import Guest

from .conftest import DescribeCounter, StartGuest
from .hops import HopDriver, hop, sevhop

MIB = 1 << 20


def memories(pid: int) -> list[MemoryMapping]:
    """What a QEMU has mapped of its memory backends."""
    process = QemuProcess.open(pid)
    try:
        return [one for one in process.mappings() if "memory-backend-memfd" in one.path]
    finally:
        process.close()


def memfd(pid: int) -> Path:
    """The guest's memory."""
    memory = memory_of(pid)
    assert memory is not None
    return memory


def backend(name: str, mib: int, more: str = "") -> tuple[str, str]:
    """A shared memory backend."""
    return ("-object", f"memory-backend-memfd,id={name},size={mib}M,share=on{more}")


def with_memory(described: DescribeCounter, mib: int, *words: str, **fields: object) -> Machine:
    """A machine whose memory is given by these arguments, instead of one memfd."""
    return described(memory="private", memory_mib=mib, more=words, **fields)


def there_and_back(guest: Guest, old: Path, new: Path) -> None:
    """The guest counts on in either QEMU, on the same pages."""
    guest.wait_for_ticks(5)
    before = {(one.device, one.inode) for one in memories(guest.pid)}
    for emulator in (new, old):
        report = hop(guest, emulator)
        mappings = memories(report.destination_pid)
        assert {(one.device, one.inode) for one in mappings} == before
        assert all(one.shared for one in mappings)
        guest.wait_for_ticks(5)
    verdict = guest.stop()
    assert verdict.unharmed, verdict


def assert_refused(guest: Guest, emulator: Path, reason: str) -> None:
    """A hop is refused, and the guest keeps running in the same process."""
    pid = guest.pid
    done = sevhop("hop", "--qmp", guest.machine.monitor, "--emulator", emulator)
    assert done.returncode == 1, done
    assert reason in done.stderr
    assert guest.pid == pid
    assert guest.wait_for_ticks(3).unharmed


class Mute(Commands):
    """A QEMU that does not report where its RAM blocks are, like those before 8, but could."""

    def __init__(self, monitor: Monitor) -> None:
        self.name = monitor.name
        self._monitor = monitor

    @property
    def version(self) -> str:
        return self._monitor.version

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float | None = None
    ) -> Any:
        answer: str = await self._monitor.execute(command, arguments, timeout=timeout)
        return re.sub(r" +(HVA +RO|0x[0-9a-f]+ +r[ow]) *\r?$", "", answer, flags=re.MULTILINE)

    async def add_fd(self, fd: int) -> tuple[int, int]:
        raise NotImplementedError


def test_ram_blocks_are_found_where_qemu_reports_them(
    new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    guest = start(counter_machine(rich=True, disk_mib=16, network=True), new)

    async def play() -> None:
        async with await Monitor.connect(guest.machine.monitor) as monitor:
            process = QemuProcess.open(monitor.peer)
            with contextlib.closing(process):
                reported = await ram_blocks.read(monitor, process)
                assert len(reported) > 5
                mute = Mute(monitor)
                assert all(row.host is None for row in parse_ramblock_table(await mute.hmp("info ramblock")))
                assert await ram_blocks.read(mute, process) == reported

    asyncio.run(play())


def test_guest_with_several_numa_nodes_hops(
    old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    """Each has a memfd of the same name; the first has the guest's pages in it, the others are of the same size."""
    words = [(*backend(f"m{n}", 16), "-numa", f"node,nodeid={n},cpus={n},memdev=m{n}") for n in range(3)]
    guest = start(with_memory(counter_machine, 48, *chain(*words), cpus=3), old)
    assert len(memories(guest.pid)) == 3
    there_and_back(guest, old, new)


def test_plugged_memory_must_be_given_to_the_destination(
    tmp_path: Path, old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    """The source's command line does not have it, so the destination's must be given."""
    spare = [word for n in range(2) for word in ("-chardev", f"file,id=spare{n},path={tmp_path / 'spare'}")]
    words = (*spare, *backend("m", 32), "-machine", "memory-backend=m", "-m", "32M,slots=2,maxmem=1G")
    guest = start(with_memory(counter_machine, 32, *words), old)
    guest.wait_for_ticks(5)
    # Descriptors with lower numbers than that of the memory are free now: for our connection, and what is plugged in.
    for n in range(2):
        guest.execute("chardev-remove", id=f"spare{n}")
    guest.execute("object-add", qom_type="memory-backend-memfd", id="more", size=128 * MIB, share=True)
    guest.execute("device_add", driver="pc-dimm", id="dimm", memdev="more")
    assert_refused(guest, new, "device dimm is missing in the new QEMU")

    before = {one.inode for one in memories(guest.pid)}
    assert len(before) == 2
    plugged = (*backend("more", 128), "-device", "pc-dimm,id=dimm,memdev=more")
    report = HopDriver().run(guest, None, command=[*guest.machine.command(new), *plugged])
    assert {one.inode for one in memories(report.destination_pid)} == before
    guest.wait_for_ticks(3)
    hop(guest, old)  # now it is on the command line
    guest.wait_for_ticks(3)
    verdict = guest.stop()
    assert verdict.unharmed, verdict


def test_hop_needs_no_more_huge_pages_than_the_guest_has(
    old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    """As many as the guest has are enough."""
    words = (*backend("m", 32, ",hugetlb=on,hugetlbsize=2M"), "-machine", "memory-backend=m")
    try:
        with host_memory.huge_pages(16):
            there_and_back(start(with_memory(counter_machine, 32, *words), old), old, new)
    except Unavailable as err:
        pytest.skip(str(err))


def test_transparent_huge_pages_stay_whole_after_a_hop(
    old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    """A hop leaves them whole."""
    try:
        with host_memory.transparent_huge_pages():
            guest = start(counter_machine(memory_mib=64, more=("-S",)), old)
            # What the guest will write to. QEMU itself may have mapped it where huge pages do not fit.
            memfd(guest.pid).open("r+b").write(bytes(counter.PATTERN + 4 * MIB))
            huge = host_memory.huge_pages_of(memfd(guest.pid))
            assert huge >= 4 * MIB
            guest.execute("cont")
            guest.wait_for_ticks(5)
            for emulator in (new, old):
                hop(guest, emulator)
                guest.wait_for_ticks(5)
                assert host_memory.huge_pages_of(memfd(guest.pid)) >= huge
            verdict = guest.stop()
            assert verdict.unharmed, verdict
    except Unavailable as err:
        pytest.skip(str(err))


def test_hop_cost_does_not_grow_with_untouched_memory(
    tmp_path: Path, old: Path, new: Path, counter_machine: DescribeCounter
) -> None:
    """It costs what a small one costs: no page of it comes into being, no process grows with it. With 36 vCPUs."""
    costs = []
    for mib in (32, 64 << 10):
        machine = replace(counter_machine(memory_mib=mib, cpus=36), directory=tmp_path / str(mib))
        with Guest.start(machine, old) as guest:
            guest.wait_for_ticks(5)
            touched = memfd(guest.pid).stat().st_blocks
            report, command = measured_hop(guest, new)
            assert memfd(guest.pid).stat().st_blocks == touched
            assert len(guest.execute("query-cpus-fast")) == 36
            costs.append(Cost(touched * 512, of_its_own(guest.pid), command, report["downtime_ms"]))
            guest.wait_for_ticks(5)
            hop(guest, old)
            guest.wait_for_ticks(5)
            verdict = guest.stop()
            assert verdict.unharmed, verdict
    print(*costs, sep="\n")
    small, large = costs
    assert large.touched == small.touched
    # QEMU needs three bits for each page, 6 MiB. That of 7.2 is asked for its blocks by reading its heap.
    assert large.destination < small.destination + 16 * MIB
    assert large.command < small.command + 32 * MIB


class Cost(NamedTuple):
    """
    What a hop has cost: bytes, and milliseconds.

    :ivar touched: of the guest's memory.
    :ivar destination: of the new QEMU, without the guest's memory.
    :ivar command: of sevhop, at most.
    """

    touched: int
    destination: int
    command: int
    downtime_ms: float


def measured_hop(guest: Guest, emulator: Path) -> tuple[dict[str, Any], int]:
    """Hop by the command; its report, and the bytes that it has had at most."""
    command = [sys.executable, "-m", "sevhop.cli", "hop", "--qmp", guest.machine.monitor, "--emulator", emulator]
    with subprocess.Popen([*map(str, command), "--json"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        report = json.load(process.stdout)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, report
    return report, usage.ru_maxrss << 10


def of_its_own(pid: int) -> int:
    """Bytes of a process's own memory: neither files nor shared memory."""
    return int(re.findall(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[0]) << 10


def test_memory_in_a_file_is_refused(
    tmp_path: Path, old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    words = ("-object", f"memory-backend-file,id=m,size=32M,share=on,mem-path={tmp_path / 'memory'}")
    guest = start(with_memory(counter_machine, 32, *words, "-machine", "memory-backend=m"), old)
    assert_refused(guest, new, "memory: m is a memory-backend-file, not memfd")


def test_private_memory_is_refused(old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest) -> None:
    guest = start(with_memory(counter_machine, 32), old)
    assert_refused(guest, new, "private to its QEMU")


def test_dimm_in_a_file_is_refused(
    tmp_path: Path, old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    """An NVDIMM: what is written to it must be in its file, and that is not the hop's to promise."""
    words = (
        *backend("m", 32),
        *("-machine", "memory-backend=m,nvdimm=on", "-m", "32M,slots=2,maxmem=1G"),
        *("-object", f"memory-backend-file,id=n,size=128M,share=on,mem-path={tmp_path / 'nvdimm'}"),
        *("-device", "nvdimm,id=nvdimm,memdev=n"),
    )
    assert_refused(start(with_memory(counter_machine, 32, *words), old), new, "n is a memory-backend-file, not memfd")


def test_ram_block_of_a_wrong_size_is_refused(
    old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest
) -> None:
    """What it reports is compared with the memory itself."""
    words = (*backend("m", 32, ",seal=off"), "-machine", "memory-backend=m")
    guest = start(with_memory(counter_machine, 32, *words), old)
    os.truncate(memfd(guest.pid), 64 * MIB)
    assert_refused(guest, new, f"QEMU reports {32 * MIB} bytes, but its memfd has {64 * MIB}")
