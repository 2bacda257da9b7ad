"""What a recovery must know of a hop. The :mod:`.journal` has it on the disk."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from sevhop_qmp.errors import SevhopError
from sevhop_qmp.invalid_data import InvalidData, invalid
from sevhop_qmp.process import QemuProcess

#: Of the format: raised with any change of the fields. A journal of another version is refused, since a recovery that
#: misses a field, or does not understand one, does the wrong thing to a guest.
VERSION = 2
#: The phase of an upgrade that has stopped on purpose, until somebody completes it.
PREPARED = "prepared"

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
#: Above the limit of any kernel.
_MOST_PIDS = 1 << 31


def uptime() -> float:
    """Seconds since the host was booted, also those in which it slept. Nobody sets this clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True)
class Process:
    """
    A process, distinguished from a later one with the same pid.

    :ivar started: clock ticks since boot (``/proc/PID/stat``, field 22).
    """

    pid: int
    started: int

    def __post_init__(self) -> None:
        """:raises ValueError: there can be no such process."""
        if not (isinstance(self.pid, int) and isinstance(self.started, int) and 0 < self.pid < _MOST_PIDS):
            raise InvalidData("a process is described that cannot exist")

    @classmethod
    def of(cls, process: QemuProcess) -> Self:
        """:raises ProcessError: it has exited."""
        return cls(process.pid, process.start_time)

    @property
    def age(self) -> float:
        """Seconds since it was started, if it still exists."""
        return uptime() - self.started / os.sysconf("SC_CLK_TCK")

    @property
    def exists(self) -> bool:
        """Whether it has not exited."""
        if (process := self.open()) is not None:
            process.close()
        return process is not None

    def open(self) -> QemuProcess | None:
        """The process; None if it has exited."""
        with contextlib.suppress(SevhopError):
            process = QemuProcess.open(self.pid)
            with contextlib.suppress(SevhopError):
                if process.alive and process.start_time == self.started:
                    return process
            process.close()
        return None


#: In the place of one that is not known: no kernel has such a pid.
NO_PROCESS = Process(_MOST_PIDS - 1, 1)


@dataclass(frozen=True)
class HopRecord:
    """
    All that a recovery must know of a hop.

    :ivar kind: ``standalone`` or ``domain``.
    :ivar guest: its name, for messages.
    :ivar command: pid of the process that wrote this, for messages.
    :ivar boot: the boot of the host in which it began (``/proc/sys/kernel/random/boot_id``).
    :ivar context: ``none``, ``sev`` or ``sev-es``.
    :ivar running: whether the guest ran when the hop began.
    :ivar stopped: whether a rollback resumes it in the source: the hop has stopped it, or is about to.
    :ivar source: its QEMU.
    :ivar monitor: standalone: path of the source's QMP socket.
    :ivar uri, uuid: domain: the daemon, and the domain there.
    :ivar xml: domain, if its guest hops into a transit: as it ran.
    :ivar old, new: emulators.
    :ivar kept: domain: where the program of the source is kept for a rollback; empty if ``old`` leads to it. See
        :mod:`sevhop.guest.kept_emulator`.
    :ivar protected_state: offset of the source's flag that may be cleared for the time of the stop, see
        :mod:`sevhop_qmp.protected_state`; 0 if there is none.
    :ivar reboot_action: what the source does when its guest reboots, if the hop has changed that.
    :ivar directory: of the hop below ``/run/sevhop``: the destination's monitor, or the keeper.
    :ivar destination: standalone: the new QEMU.
    :ivar transit: domain: the QEMU beside libvirt in which the guest runs while libvirt starts the new one.
    :ivar transit_monitor, transit_directory: its QMP socket, and its directory.
    :ivar run_mark: standalone, and of the transit: inode of the mark that records whether the guest has run there,
        which the source has open, too; see :mod:`sevhop_qmp.run_mark`.
    :ivar phase: the last one that was begun.
    :ivar loaded: standalone, and of the transit: all state of the guest is loaded in the destination.
    :ivar committed: there is no rollback any more.
    :ivar broken: why the destination must not run although the context is there.
    :ivar oom_score_adj: standalone, and of the transit: the source's, which the destination gets when it has the guest.
    :ivar guest_paths: standalone: paths that must lead to the destination after the hop; see
        :mod:`sevhop.engine.guest_paths`.
    :ivar settings: made at run time, of a guest that hops into a transit; see :mod:`sevhop.guest.saved_settings`.
    :ivar cgroups: directories of those that were made for a transit; see :mod:`sevhop.process.machine_cgroup`.
    :ivar apparmor_profile: name of the one that was loaded for a transit; see :mod:`sevhop.process.apparmor_profile`.
    :ivar began: when the hop began, by :func:`uptime`.
    :ivar stopped_at: when it last stopped the guest, by :func:`uptime`; 0 if it has not.
    :ivar stopped_ms: milliseconds for which it had stopped the guest before the phase in progress.
    :ivar images: those of a guest that is suspended in the keeper, which nobody may change; see
        :mod:`sevhop.disks.unchanged_images`.
    :ivar images_at: when they were recorded, by :func:`time.monotonic`.
    :ivar failures: recoveries that have failed, one after the other.
    :ivar failure: why the last one has, or the upgrade that left the guest in the transit.
    :ivar next_attempt: when the timer tries again, by :func:`uptime`.
    """

    kind: str
    guest: str
    context: str
    running: bool
    source: Process
    monitor: str = ""
    uri: str = ""
    uuid: str = ""
    xml: str = ""
    old: str = ""
    new: str = ""
    kept: str = ""
    protected_state: int = 0
    reboot_action: str = ""
    directory: str = ""
    destination: Process | None = None
    transit: Process | None = None
    transit_monitor: str = ""
    transit_directory: str = ""
    run_mark: int = 0
    phase: str = ""
    stopped: bool = False
    loaded: bool = False
    committed: bool = False
    broken: str = ""
    guest_paths: dict[str, Any] = field(default_factory=dict)
    oom_score_adj: int = 0
    settings: str = ""
    cgroups: list[str] = field(default_factory=list)
    apparmor_profile: str = ""
    began: float = field(default_factory=uptime)
    stopped_at: float = 0.0
    stopped_ms: float = 0.0
    images: dict[str, Any] = field(default_factory=dict)
    images_at: float = 0.0
    failures: int = 0
    failure: str = ""
    next_attempt: float = 0.0
    version: int = VERSION
    command: int = field(default_factory=os.getpid)
    boot: str = field(default_factory=lambda: _BOOT_ID.read_text().strip())

    def __post_init__(self) -> None:
        """:raises ValueError: a field has an invalid value."""
        for one in fields(self):
            value = getattr(self, one.name)
            if not isinstance(value, _TYPES[one.type]) or (isinstance(value, str) and "\0" in value):
                raise InvalidData(f"the field {one.name} has an invalid value")

    @property
    def key(self) -> str:
        """The identity of the guest, as a file name."""
        return f"domain-{self.uuid}" if self.kind == "domain" else f"process-{self.source.pid}-{self.source.started}"

    @property
    def this_boot(self) -> bool:
        """Whether the host has not been rebooted since."""
        return self.boot == _BOOT_ID.read_text().strip()

    def with_fields(self, changed: dict[str, Any]) -> Self:
        """
        The record with the fields of a further line.

        :raises ValueError: these are no fields of a record.
        """
        try:
            for name in ("source", "destination", "transit"):
                if changed.get(name) is not None:
                    changed = changed | {name: Process(**changed[name])}
            new = replace(self, **changed)
        except (TypeError, ValueError) as err:
            raise InvalidData(f"invalid field: {invalid(err)}") from err
        return new


#: Of the fields, by annotation.
_TYPES: dict[Any, Any] = {
    "str": str,
    "bool": bool,
    "int": int,
    "float": (int, float),
    "dict[str, Any]": dict,
    "list[str]": list,
    "Process": Process,
    "Process | None": Process | None,
}
