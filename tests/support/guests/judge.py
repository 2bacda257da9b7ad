"""
What happened to a guest, from what it left behind: its serial log, and its disk after it has been stopped.

A guest prints numbers, each one more than the last. One that is missing was lost with the state of the guest, or
with its output; one that comes again means that the guest went back in time. Both guests are judged alike.
"""

from __future__ import annotations

import json
import re
import struct
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from .machine import Machine

_COUNTER_LINE = re.compile(r"[0-9a-f]{8}")
_LINUX_LINE = re.compile(r"TICK (\d+) w=(\d+) r=(\d+) ping=(\d) mem=(\d+)")

#: The Linux guest writes tick n to the block n modulo the disk's size, all over it.
DISK_BLOCK = 4096


@dataclass
class Verdict:
    """
    What a serial log contains. A guest that was never harmed has only ``ticks`` and ``last``.

    :ivar ticks: how many numbers there are.
    :ivar last: the highest number since the last start.
    :ivar ticks_lost: numbers that are missing.
    :ivar ticks_repeated: numbers that came again, or late.
    :ivar restarts: starts after the first.
    :ivar disk_errors: writes that failed, blocks that were not read back as written, and what is wrong with the image.
    :ivar network_errors: pings without an answer.
    :ivar memory_errors: places in memory that did not hold what the guest had written there.
    :ivar device_errors: pauses that were too short, a clock that went back, a TPM that is not what it was.
    :ivar warnings: what the guest's kernel has warned of, also of what has nothing to do with a hop.
    :ivar writes: whether it is a guest that writes its ticks to its disk.
    """

    ticks: int = 0
    last: int = 0
    ticks_lost: int = 0
    ticks_repeated: int = 0
    restarts: int = 0
    disk_errors: int = 0
    network_errors: int = 0
    memory_errors: int = 0
    device_errors: int = 0
    writes: bool = False
    warnings: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def unharmed(self) -> bool:
        """Whether the guest ran, and nothing at all went wrong."""
        return self.ticks > 0 and not (
            self.ticks_lost
            or self.ticks_repeated
            or self.restarts
            or self.disk_errors
            or self.network_errors
            or self.memory_errors
            or self.device_errors
        )

    def _tick(self, number: int) -> None:
        self.ticks += 1
        if number <= self.last:
            self.ticks_repeated += 1
            self.remarks.append(f"{number} after {self.last}")
            return
        if number > self.last + 1:
            self.ticks_lost += number - self.last - 1
            self.remarks.append(f"{number} after {self.last}")
        self.last = number


def judge_log(log: str) -> Verdict:
    """
    Judge a serial log. Lines that are neither numbers nor marks are the kernel's or the firmware's and do not count;
    an unfinished last line does not either.
    """
    verdict = Verdict()
    started = False
    for line in log.split("\n")[:-1]:
        line = line.strip("\r")
        if line.endswith("START"):  # firmware may leave its cursor in the middle of a line
            verdict.restarts += started
            started = True
            verdict.last = 0
        elif _COUNTER_LINE.fullmatch(line):
            verdict._tick(int(line, 16))
        elif line.startswith("WARNING "):
            verdict.warnings.append(line.removeprefix("WARNING "))
        elif line.startswith("BAD "):
            verdict.memory_errors += 1
            verdict.remarks.append(line)
        elif line.startswith(("EARLY ", "RTC-BACK ", "TPM-LOST ")):
            verdict.device_errors += 1
            verdict.remarks.append(line)
        elif found := _LINUX_LINE.fullmatch(line):
            number, write, read, ping, memory = map(int, found.groups())
            verdict.writes = True
            verdict._tick(number)
            verdict.disk_errors += write != 0 or read != number
            verdict.network_errors += ping
            verdict.memory_errors += memory
            if write or read != number or ping or memory:
                verdict.remarks.append(line)
    return verdict


def judge(machine: Machine) -> Verdict:
    """
    Judge a guest that has been stopped (its disk image may not be in use).

    The disk must hold every tick that the guest has printed, and be a faultless image.
    """
    return judge_files(machine.serial, machine.disk if machine.disk_mib else None)


def judge_files(serial: Path, disk: Path | None) -> Verdict:
    """The same of the files of any guest that has been stopped."""
    verdict = judge_log(serial.read_text(encoding="ascii", errors="replace") if serial.exists() else "")
    if disk is not None and disk.exists():
        problems = _image_problems(disk)
        if verdict.writes:
            problems += _missing_blocks(disk, verdict.last)
        verdict.disk_errors += len(problems)
        verdict.remarks += problems
    return verdict


def _image_problems(image: Path) -> list[str]:
    done = subprocess.run(["qemu-img", "check", "--output=json", image], capture_output=True, text=True, check=False)
    try:
        report = json.loads(done.stdout)
    except ValueError:
        return [f"qemu-img check: {done.stderr.strip()}"]
    kinds = ("corruptions", "leaks", "check-errors")
    return [f"qemu-img check: {report[kind]} {kind}" for kind in kinds if report.get(kind)]


def _missing_blocks(image: Path, last: int) -> list[str]:
    """One line for each of the last ticks that is not on the disk."""
    problems = []
    with tempfile.NamedTemporaryFile(dir=image.parent, suffix=".raw") as raw:
        subprocess.run(["qemu-img", "convert", "-O", "raw", image, raw.name], check=True)
        blocks = Path(raw.name).stat().st_size // DISK_BLOCK
        for number in range(max(1, last - blocks + 1), last + 1):
            raw.seek(number % blocks * DISK_BLOCK)
            found = set(struct.unpack(f"<{DISK_BLOCK // 8}Q", raw.read(DISK_BLOCK)))
            # The guest may have been stopped after writing a tick and before printing it: that is over the oldest.
            overwritten = number == last + 1 - blocks and found == {last + 1}
            if found != {number} and not overwritten:
                problems.append(f"disk block of tick {number} holds {sorted(found)[:3]}")
    return problems
