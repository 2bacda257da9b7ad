"""Options and their defaults: the same for the command line, the Python API and the engines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, time
from typing import ClassVar

from sevhop_qmp.time_limits import COMMAND_TIMEOUT

_WINDOW = re.compile(r"(\d{1,2}:\d{2})-(\d{1,2}:\d{2})")


@dataclass(frozen=True, kw_only=True)
class HopOptions:
    """
    Options of a hop outside libvirt.

    :ivar emulator: the QEMU to hop to; by default the file that the source was started from, as it is on disk now.
    :ivar command: the destination's whole command line, which names the emulator; by default the source's own.
    :ivar step_timeout: seconds for each step of the downtime.
    :ivar start_timeout: seconds for the destination to start and answer on its monitor.
    :ivar move_deadline: seconds for which a busy move of the SEV context is retried.
    """

    emulator: str | None = None
    command: Sequence[str] | None = None
    step_timeout: float = COMMAND_TIMEOUT
    start_timeout: float = 30.0
    move_deadline: float = 2.0


@dataclass(frozen=True, kw_only=True)
class UpgradeOptions:
    """
    Options of the upgrade of a libvirt domain.

    :ivar emulator: the QEMU to upgrade to; by default the one that the domain was started from, as it is on disk now.
    :ivar prepare_only: stop when libvirt has ended the old QEMU, and the guest runs in the transit, or is suspended in
        the keeper; ``virsh restore`` completes the upgrade.
    :ivar dry_run: check only; the outcome is ``checked``.
    :ivar transit: have the guest run in a QEMU beside libvirt while libvirt ends the old one and starts the new one; a
        domain for which that is not possible is upgraded without.
    :ivar rehearse: without a transit: load a copy of the device state into the new QEMU first.
    :ivar set_time: have the guest agent set the clock of a guest that was stopped for long.
    :ivar step_timeout: seconds for each step of the downtime.
    :ivar move_deadline: seconds for which a busy move of the SEV context is retried.
    """

    emulator: str | None = None
    prepare_only: bool = False
    dry_run: bool = False
    transit: bool = True
    rehearse: bool = True
    set_time: bool = True
    step_timeout: float = HopOptions.step_timeout
    move_deadline: float = HopOptions.move_deadline


@dataclass(frozen=True, kw_only=True)
class RecoverOptions:
    """
    Options of a recovery.

    :ivar unattended: nobody has asked for it: a hop whose recovery has failed is tried less and less often, and a guest
        that is suspended in the keeper is not restored when that is older than ``max_age``.
    :ivar max_age: seconds since the guest was stopped; None without a limit.
    :ivar emulator: the QEMU for a guest that waits for libvirt, instead of those that the hop has recorded.
    :ivar set_time: have the guest agent set the clock of a guest that was stopped for long.
    :ivar step_timeout: seconds for each step.
    """

    unattended: bool = False
    max_age: float | None = None
    emulator: str | None = None
    set_time: bool = True
    step_timeout: float = HopOptions.step_timeout

    #: Of a recovery that nobody has asked for, by default.
    UNATTENDED_AGE: ClassVar[float] = 3600.0


@dataclass(frozen=True)
class Window:
    """
    The maintenance window of a fleet: a part of each day, in the host's time zone; it may include midnight.

    :ivar begin: its first minute.
    :ivar end: the first minute after it.
    """

    begin: time
    end: time

    @classmethod
    def parse(cls, text: str) -> Window:
        """
        Such as ``01:00-05:00``.

        :raises ValueError: it is none.
        """
        found = _WINDOW.fullmatch(text)
        if found is None:
            raise ValueError(f"{text} is not of the form HH:MM-HH:MM")
        begin, end = (datetime.strptime(word, "%H:%M").time() for word in found.groups())
        if begin == end:
            raise ValueError(f"{text} has no length")
        return cls(begin, end)

    def is_open(self) -> bool:
        """Whether it is that time of day now."""
        return self.includes(datetime.now().time())

    def includes(self, moment: time) -> bool:
        """Whether a time of day is in it."""
        if self.begin < self.end:
            return self.begin <= moment < self.end
        return moment >= self.begin or moment < self.end

    def __str__(self) -> str:
        return f"{self.begin:%H:%M}-{self.end:%H:%M}"
