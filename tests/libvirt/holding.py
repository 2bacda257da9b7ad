"""Pausing an upgrade, or libvirt, at a known point, so that something can be done meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.guests.daemon import Daemon, DomainGuest
from tests.support.guests.running import GuestFailed, wait_until

_PATIENCE = 600
_PROGRAM = Path(__file__).with_name("halting.py")


def _stops(pid: int) -> bool:
    """Wait until a child stops (SIGSTOP), or exits. :return: whether it has stopped."""
    found = os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    return found is not None and found.si_code == os.CLD_STOPPED


class PausedUpgrade:
    """An upgrade that is stopped before a phase."""

    def __init__(self, command: subprocess.Popen[str]) -> None:
        self._command = command

    @classmethod
    @contextmanager
    def at(
        cls, phase: str, guest: DomainGuest, emulator: Path, *arguments: str, environment: str = ""
    ) -> Iterator[PausedUpgrade]:
        """Start one, perhaps with further arguments, and stop it. :param environment: ``NAME=VALUE`` for it."""
        program: list[str | Path] = [*(["env", environment] if environment else []), sys.executable, _PROGRAM]
        command = guest.daemon.start_command(
            *program, phase, "upgrade", guest.name, "--json", "--emulator", emulator, *arguments
        )
        try:
            if not _stops(command.pid):
                raise GuestFailed(f"the upgrade did not reach phase {phase}: {command.communicate()}")
            yield cls(command)
        finally:
            if command.poll() is None:
                command.kill()
                command.communicate(timeout=_PATIENCE)

    @property
    def pid(self) -> int:
        """Of the command."""
        return self._command.pid

    def resume(self) -> None:
        """Continue it."""
        self._command.send_signal(signal.SIGCONT)

    def interrupt(self, number: signal.Signals = signal.SIGINT) -> None:
        """As Ctrl-C, or with another signal, which is delivered when it continues."""
        self._command.send_signal(number)

    def finish(self) -> dict[str, Any]:
        """Continue it, and wait for its exit. :return: its report."""
        self.resume()
        out, _ = self._command.communicate(timeout=_PATIENCE)
        report: dict[str, Any] = json.loads(out)["domains"][0]
        return report | {"status": self._command.returncode}


class Checkpoint:
    """
    A hook that blocks libvirt the first time that it reaches a step of a domain.

    :ivar directory: in the daemon's file system.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        # Open for reading, too: what is written stays there for a hook that is about to open it.
        self._go = os.open(directory / "go", os.O_RDWR | os.O_CLOEXEC)

    @classmethod
    @contextmanager
    def at(cls, daemon: Daemon, guest: DomainGuest, step: str, *, after: bool = False) -> Iterator[Checkpoint]:
        """
        Install the hook.

        :param step: such as ``started/begin``.
        :param after: after sevhop's own hook, instead of before.
        """
        own = Path("/run/checkpoint")
        directory = daemon.root / str(own).lstrip("/")
        script = daemon.root / "etc/libvirt/hooks/qemu.d" / ("zz-checkpoint" if after else "aa-checkpoint")
        directory.mkdir()
        os.mkfifo(directory / "go")
        (directory / "armed").touch()
        script.write_text(
            f'#!/bin/sh\n[ "$1 $2/$3" = "{guest.name} {step}" ] || exit 0\n'
            f"mv {own}/armed {own}/reached 2>/dev/null && read _ <{own}/go\nexit 0\n"
        )
        script.chmod(0o755)
        checkpoint = cls(directory)
        try:
            yield checkpoint
        finally:
            script.unlink()
            for path in directory.iterdir():
                path.unlink()
            os.close(checkpoint._go)  # a hook that waits reads its end
            directory.rmdir()

    def wait(self) -> None:
        """Wait until libvirt has reached it."""
        wait_until((self._directory / "reached").exists, _PATIENCE, "libvirt reaches the step")

    def release(self) -> None:
        """Unblock libvirt, which is blocked, or about to be."""
        os.write(self._go, b"\n")
