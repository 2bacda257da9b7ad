"""
A guest that runs: started, controlled, waited for, stopped.

The guest is *what serves its monitor and has its directory on the command line*, not the process that was started
first: a hop replaces that one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sevhop_qmp.errors import MonitorError
from sevhop_qmp.monitor import Monitor

from .judge import Verdict, judge_files, judge_log
from .machine import Machine

#: Seconds until an emulator must answer. In the lab one with a large SEV guest takes 12 on an idle machine.
START_TIMEOUT = 120.0
#: Seconds until a guest must have printed something. Linux with UEFI takes 30 under emulation on a busy machine.
PATIENCE = 150.0
#: Seconds until a monitor must answer that is asked by a test, not by sevhop: the machine may be busy.
ANSWER_TIMEOUT = 60.0
#: Seconds until a guest that was terminated must have exited.
STOP_TIMEOUT = 20.0
#: Seconds between two looks at something that cannot be waited for.
_POLL = 0.01


class GuestFailed(Exception):
    """A guest did not do what was expected of it in time; the message has what its QEMU printed."""


def wait_until(condition: Callable[[], bool], timeout: float, what: str) -> None:
    """
    Wait until a condition holds.

    :param timeout: seconds.
    :param what: what is waited for, for the message.
    :raises GuestFailed: it did not come true in time.
    """
    begin = time.monotonic()
    deadline = begin + timeout
    while not condition():
        now = time.monotonic()
        if now > deadline:
            raise GuestFailed(f"{what}: not within {timeout:g} s")
        # Reading a long log takes long in emulation: at least half of the time is the guest's.
        time.sleep(max(_POLL, now - begin))
        begin = time.monotonic()


def processes_of(directory: Path) -> list[int]:
    """The pids of the processes that have a directory, or a file in it, on their command line (zombies do not)."""
    return _processes_with(re.escape(os.fsencode(directory)) + rb"(/|\0|,|$)")


def processes_of_domain(name: str) -> list[int]:
    """The pids of the processes that run a domain of this name, in whatever namespace."""
    return _processes_with(rb"\0guest=" + re.escape(os.fsencode(name)) + rb"[,\0]")


def _processes_with(words: bytes) -> list[int]:
    """By what is on their command lines."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if re.search(words, Path(entry.path, "cmdline").read_bytes()):
                    found.append(int(entry.name))
    return found


def wait_ended(pid: int, timeout: float) -> bool:
    """Wait for a process to end, anybody's; whether it has."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        return bool(poll.poll(timeout * 1000))
    finally:
        os.close(handle)


class Guest:
    """
    A running guest. Use :meth:`start`, as a context manager: at its end no process is left.

    :ivar machine: what it runs on.
    :ivar process: the QEMU that it was started in.
    """

    def __init__(self, machine: Machine, process: subprocess.Popen[bytes]) -> None:
        self.machine = machine
        self.process = process

    @classmethod
    def start(cls, machine: Machine, emulator: Path) -> Self:
        """
        Make the guest's files and start it. It runs, and its monitor answers, when this returns.

        :raises GuestFailed: QEMU ended or did not answer; the message has its last words.
        """
        machine.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        machine.make_files()
        with open(machine.messages, "ab") as messages:
            process = subprocess.Popen(
                machine.command(emulator),
                stdin=subprocess.DEVNULL,
                stdout=messages,
                stderr=messages,
                start_new_session=True,
            )
        guest = cls(machine, process)
        try:
            wait_until(guest._answers, START_TIMEOUT, "QEMU answers")
        except BaseException:
            guest.kill()
            raise
        return guest

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def _answers(self) -> bool:
        if self.process.poll() is not None:
            raise GuestFailed(f"QEMU ended with {self.process.returncode}: {self.said()}")
        try:
            self.execute("query-version")
        except MonitorError:
            return False
        return True

    def said(self) -> str:
        """What QEMU wrote to its stderr."""
        return self.machine.messages.read_text(errors="replace").strip() if self.machine.messages.exists() else ""

    async def monitor(self) -> Monitor:
        """
        A connection to the guest's monitor: ``async with await guest.monitor() as monitor``.

        A monitor serves one client at a time: give it back before somebody else needs it.
        """
        return await Monitor.connect(self.machine.monitor, timeout=ANSWER_TIMEOUT, greeting_timeout=ANSWER_TIMEOUT)

    def execute(self, command: str, **arguments: object) -> Any:
        """
        Run one QMP command on a connection of its own. Not from inside a coroutine: use :meth:`monitor` there.

        :param arguments: with underscores for QMP's hyphens.
        """

        async def run() -> Any:
            named = {key.replace("_", "-"): value for key, value in arguments.items()}
            async with await self.monitor() as monitor:
                return await monitor.execute(command, named)

        return asyncio.run(run())

    @property
    def pid(self) -> int:
        """The process that serves the guest's monitor now."""

        async def peer() -> int:
            async with await self.monitor() as monitor:
                return monitor.peer

        return asyncio.run(peer())

    def log(self) -> str:
        """What the guest has written to its serial port."""
        path = self.machine.serial
        return path.read_text(encoding="ascii", errors="replace") if path.exists() else ""

    def seen(self) -> Verdict:
        """What the log contains so far."""
        return judge_log(self.log())

    def wait_for_ticks(self, more: int, timeout: float = PATIENCE) -> Verdict:
        """
        Wait until the guest has counted on.

        :param more: numbers beyond those in the log now.
        :param timeout: seconds.
        :raises GuestFailed: it did not.
        """
        wanted = self.seen().ticks + more
        try:
            wait_until(lambda: self.seen().ticks >= wanted, timeout, f"{more} more ticks")
        except GuestFailed as err:
            raise GuestFailed(f"{err}; the log ends with {self.log()[-200:]!r}, QEMU said {self.said()!r}") from None
        return self.seen()

    def wait_for_line(self, text: str, timeout: float = PATIENCE) -> str:
        """
        Wait until a line of the log contains a text, and return the last such line.

        :param timeout: seconds.
        """
        wait_until(lambda: any(text in line for line in self._lines()), timeout, f"a line with {text!r}")
        return [line for line in self._lines() if text in line][-1]

    def _lines(self) -> list[str]:
        return [line.strip("\r") for line in self.log().split("\n")[:-1]]

    def stop(self) -> Verdict:
        """
        End the guest in good order (its disk is flushed) and judge it.

        :raises GuestFailed: it did not end.
        """
        pids = processes_of(self.machine.directory)
        image = self._image()
        with contextlib.suppress(MonitorError):
            self.execute("quit")
        try:
            for pid in pids:
                if not wait_ended(pid, STOP_TIMEOUT):
                    raise GuestFailed(f"QEMU did not end within {STOP_TIMEOUT:g} s")
        finally:
            self.kill()
        return judge_files(self.machine.serial, image)

    def _image(self) -> Path | None:
        """The image that its disk has now: the one that it was started with, or a snapshot of that."""
        if not self.machine.disk_mib:
            return None
        with contextlib.suppress(MonitorError):
            for row in self.execute("query-block"):
                if row.get("qdev", "").endswith("/virtio-backend"):
                    return Path(row["inserted"]["file"])
        return self.machine.disk

    def kill(self) -> None:
        """End every process of the guest, at once. The guest may have ended already."""
        for pid in processes_of(self.machine.directory):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            wait_ended(pid, STOP_TIMEOUT)
        self.process.kill()
        self.process.wait(STOP_TIMEOUT)
