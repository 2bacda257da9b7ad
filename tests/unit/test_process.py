"""A process seen from outside, in states in which no QEMU should be and one that was taken over may be."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sevhop_qmp.process import QemuProcess

from tests.support.guests.running import wait_until

#: The first thread exits, another one waits until its standard input is closed.
LEADER_ENDS = """
import ctypes, sys, threading
threading.Thread(target=sys.stdin.read).start()
ctypes.CDLL(None).syscall(60, 0)
"""

SIZE = 200 << 20
LARGE = f"import time; memory = bytearray(b'x') * {SIZE}; time.sleep(60)"


def resident(status: str) -> int:
    """Bytes of memory of a process, from its ``/proc/PID/status``."""
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) << 10


@contextmanager
def started(*command: str) -> Iterator[tuple[subprocess.Popen[bytes], QemuProcess]]:
    with subprocess.Popen(command, stdin=subprocess.PIPE) as child:
        process = QemuProcess.open(child.pid)
        try:
            yield child, process
        finally:
            process.close()
            child.kill()


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_process_lives_until_its_last_thread_exits() -> None:
    with started(sys.executable, "-c", LEADER_ENDS) as (child, process):
        wait_until(lambda: state(child.pid) == "Z", 10, "the first thread has exited")
        assert process.alive
        assert process.start_time
        assert child.stdin is not None
        child.stdin.close()
        wait_until(lambda: not process.alive, 10, "the last thread has exited")
        child.wait()
        assert not process.alive


def test_zombie_is_not_alive() -> None:
    with started("true") as (child, process):
        wait_until(lambda: state(child.pid) == "Z", 10, "it has exited")
        assert not process.alive
        child.wait()
        assert not process.alive


def test_process_that_is_killed_does_not_live_on() -> None:
    """It is alive, in a sense, until its memory is freed, of which it has much: nothing else is to be read of it."""
    with started(sys.executable, "-c", LARGE) as (child, process):
        memory = Path(f"/proc/{child.pid}/status")
        wait_until(lambda: resident(memory.read_text()) > SIZE, 10, "it has its memory")
        assert asyncio.run(process.lives_on())
        process.kill()
        while Path(f"/proc/{child.pid}/cmdline").read_bytes():
            pass
        assert not asyncio.run(process.lives_on())


def test_limits_are_those_of_the_kernel() -> None:
    with started("sleep", "infinity") as (_, process):
        text = Path(f"/proc/{process.pid}/limits").read_text()
        assert len(process.limits) == len(text.splitlines()) - 1 == 16
