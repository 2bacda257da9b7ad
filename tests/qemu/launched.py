"""Machines whose QEMU is started by something else: a user, a shell that sets limits, a cgroup."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

from tests.support.guests.machine import Machine


@dataclass(frozen=True)
class Launched(Machine):
    """
    A machine like another one.

    :ivar by: argv in front of the emulator's.
    """

    by: tuple[str, ...] = ()

    @classmethod
    def like(cls, machine: Machine, *by: str) -> Self:
        """The machine, started by a program that executes the rest of its command line."""
        return cls(**{one.name: getattr(machine, one.name) for one in fields(Machine)}, by=by)

    def command(self, emulator: Path) -> list[str]:
        """The whole command line."""
        return [*self.by, *super().command(emulator)]


def user(uid: int) -> tuple[str, ...]:
    """An ordinary user, who is in no other group."""
    return ("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups")


def shell(script: str) -> tuple[str, ...]:
    """A shell that does something first."""
    return ("sh", "-c", f'{script}; exec "$@"', "sh")
