"""
What a hop does during the downtime, counted instead of timed: this does not depend on the machine.

QEMU reads its monitors byte by byte, so every command adds some tenths of a millisecond to the downtime. Whoever adds
one changes the list here, and knows what it costs.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from .conftest import DescribeCounter, StartGuest
from .hops import STOP, STREAM_END, HopDriver, observe_commands

#: From the first phase in which the guest is stopped to the last.
DOWNTIME = ("stop", "map", "save", "load", "commit", "resume")
#: What is queried again in the source right before the guest stops.
QUERIES = {
    *("query-status", "qom-list", "query-migrate", "query-jobs", "query-dump"),
    *("query-named-block-nodes", "x-debug-query-block-graph", "query-block", "query-block-exports"),
    *("qom-get", "query-chardev", "query-vnc-servers", "query-spice", "query-vm-generation-id"),
    "human-monitor-command",
}
#: The commands, each in the phase in which it is sent. They are sent together. The destination gets no command, but the
#: stream.
COMMANDS = [
    ("stop", "stop"),
    ("stop", "xen-save-devices-state"),
]
#: Audit events of Python (https://docs.python.org/3/library/audit_events.html) that must not occur in the downtime.
SLOW = ("import", "subprocess.Popen", "os.fork", "os.exec", "os.posix_spawn", "time.sleep", "socket.connect")

_listeners: list[list[str]] = []


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if _listeners and event in SLOW:
        _listeners[-1].append(f"{event} {arguments[:1]}")


@contextmanager
def audited() -> Iterator[list[str]]:
    """Collect the slow events meanwhile. A hook cannot be removed, so there is only one."""
    if not hasattr(audited, "installed"):
        sys.addaudithook(_hook)
        audited.installed = True  # type: ignore[attr-defined]
    seen: list[str] = []
    _listeners.append(seen)
    try:
        yield seen
    finally:
        _listeners.remove(seen)


@pytest.mark.parametrize("rich", [False, True])
def test_downtime_has_only_the_listed_commands(
    rich: bool,
    old: Path,
    new: Path,
    counter_machine: DescribeCounter,
    start: StartGuest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guest = start(counter_machine(rich=rich, disk_mib=16 if rich else 0, network=rich), old)
    guest.wait_for_ticks(5)
    driver = HopDriver()
    commands: list[tuple[str, str]] = []
    slow: list[tuple[str, str]] = []

    def note_slow() -> None:
        slow.extend((driver.phases[-1], event) for event in seen)
        seen.clear()

    def note(command: str, _: Mapping[str, object]) -> None:
        note_slow()
        commands.append((driver.phases[-1], command))

    observe_commands(monkeypatch, note, note_slow)
    with audited() as seen:
        report = driver.run(guest, new)
    assert report.outcome == "done"
    stopped = commands.index(COMMANDS[0])
    assert {command for phase, command in commands[:stopped] if phase in DOWNTIME} <= QUERIES
    assert [(phase, command) for phase, command in commands[stopped:] if phase in DOWNTIME] == COMMANDS
    assert [(phase, event) for phase, event in slow if phase in DOWNTIME] == []
    assert any(phase == "prepare" for phase, _ in slow)  # the audit works: there the destination is started
    guest.wait_for_ticks(5)


#: System calls of the main thread between the order to stop and the end of the stream, from which on nobody waits for
#: us. How many it takes to wait varies.
MOST_CALLS = 110
#: What they are for: monitors and pipes, waiting, journal records (in no case their way to the disk), memory, halting
#: the source. Files are opened below /proc alone.
ALLOWED = {
    *("sendto", "recvfrom", "read", "write", "pread64", "pwrite64", "openat", "newfstatat", "fstat", "close"),
    *("epoll_wait", "epoll_ctl", "futex", "getpid"),
    *("mmap", "munmap", "mremap", "brk", "madvise"),
    *("sched_getscheduler", "sched_setscheduler"),
    *("pidfd_send_signal", "getdents64"),
    *("lseek", "fcntl"),  # which files the source has open, and which of them it has locked
}


def test_downtime_has_only_allowed_system_calls(
    old: Path, new: Path, counter_machine: DescribeCounter, start: StartGuest, tmp_path: Path
) -> None:
    guest = start(counter_machine(), old)
    guest.wait_for_ticks(5)
    log = tmp_path / "calls"
    hop = [sys.executable, "-m", "sevhop.cli", "hop", "--qmp", str(guest.machine.monitor), "--emulator", str(new)]
    subprocess.run(["strace", "--output", log, *hop], check=True, capture_output=True)
    lines = log.read_text(errors="replace").splitlines()
    (stop,), (end,) = ([at for at, line in enumerate(lines) if what in line] for what in (STOP, STREAM_END))
    lines = lines[stop + 1 : end]
    calls = [line.partition("(")[0] for line in lines if "(" in line]
    assert set(calls) <= ALLOWED
    assert all('"/proc/' in line for line in lines if line.startswith("openat("))
    assert calls.count("sendto") == len(COMMANDS) - 1
    assert 20 < len(calls) < MOST_CALLS
    guest.wait_for_ticks(5)
