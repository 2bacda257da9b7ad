"""
Scheduling of the threads of a QEMU: policy, priority, niceness, CPU affinity, I/O priority, timer slack, cgroups.

An administrator sets these for threads of a running guest: a vCPU is pinned, an iothread gets a priority. A destination
gets what the source has, thread by thread: vCPUs by their index, iothreads by their name, the first thread, and all
others like the first one, which has created them. See sched(7), ioprio_set(2), cgroups(7).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Self

from sevhop_qmp.errors import ProcessError, SevhopError
from sevhop_qmp.invalid_data import protocol_errors
from sevhop_qmp.process import QemuProcess

from .in_words import in_words

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sevhop_qmp.monitor import Commands

_SYS_SCHED_SETATTR, _SYS_SCHED_GETATTR = 314, 315
_SYS_IOPRIO_SET, _SYS_IOPRIO_GET = 251, 252
_WHO_PROCESS = 1
#: struct sched_attr of Linux 5.3: size, policy, flags, nice, priority, runtime, deadline, period, clamps.
_ATTRIBUTES = struct.Struct("=IIQiIQQQII")
_POLICIES = {0: "SCHED_OTHER", 1: "SCHED_FIFO", 2: "SCHED_RR", 3: "SCHED_BATCH", 5: "SCHED_IDLE", 6: "SCHED_DEADLINE"}
_DEADLINE = 6
#: The values without CONFIG_UCLAMP_TASK, and the default values; the flags that set them.
_NO_CLAMPS = ((0, 0), (0, 1024))
_SETS_CLAMPS = 0x60

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class Thread(NamedTuple):
    """
    Scheduling of one thread.

    :ivar flags: of sched_setattr(2), such as SCHED_FLAG_RESET_ON_FORK.
    :ivar deadline: runtime, deadline and period of SCHED_DEADLINE, nanoseconds.
    :ivar clamps: minimum and maximum utilisation.
    :ivar affinity: processors that it may run on.
    :ivar io_priority: class and level, as returned by ioprio_get(2).
    :ivar timer_slack: nanoseconds; empty if access is denied.
    """

    policy: int
    flags: int
    nice: int
    priority: int
    deadline: tuple[int, int, int]
    clamps: tuple[int, int]
    affinity: frozenset[int]
    io_priority: int
    timer_slack: str

    @classmethod
    def of(cls, thread: int) -> Self:
        """
        :param thread: its id.
        :raises ProcessError: it has exited, or access is denied.
        """
        data = ctypes.create_string_buffer(_ATTRIBUTES.size)
        try:
            _checked(_libc.syscall(_SYS_SCHED_GETATTR, thread, data, _ATTRIBUTES.size, 0))
            _, policy, flags, nice, priority, *deadline, low, high = _ATTRIBUTES.unpack(data.raw)
            io_priority = _checked(_libc.syscall(_SYS_IOPRIO_GET, _WHO_PROCESS, thread))
            affinity = frozenset(os.sched_getaffinity(thread))
        except OSError as err:
            raise ProcessError(f"cannot read the scheduling of thread {thread}: {err.strerror}") from err
        slack = ""
        with contextlib.suppress(OSError):
            slack = Path(f"/proc/{thread}/timerslack_ns").read_text(encoding="ascii").strip()
        # With other policies the first is the length of a slice, which follows the host's setting with a delay.
        first, second, third = deadline if policy == _DEADLINE else (0, 0, 0)
        return cls(policy, flags, nice, priority, (first, second, third), (low, high), affinity, io_priority, slack)

    def apply(self, thread: int) -> None:
        """
        Have another thread scheduled like this one.

        :raises OSError: that is not possible, or not allowed.
        """
        now = Thread.of(thread)
        if now.affinity != self.affinity:
            os.sched_setaffinity(thread, self.affinity)
        if now._attributes() != self._attributes():
            _checked(_libc.syscall(_SYS_SCHED_SETATTR, thread, self._attributes(), 0))
        if now.io_priority != self.io_priority:
            _checked(_libc.syscall(_SYS_IOPRIO_SET, _WHO_PROCESS, thread, self.io_priority))
        if self.timer_slack not in ("", now.timer_slack):
            Path(f"/proc/{thread}/timerslack_ns").write_text(self.timer_slack, encoding="ascii")

    def _attributes(self) -> bytes:
        flags = self.flags if self.clamps in _NO_CLAMPS else self.flags | _SETS_CLAMPS
        return _ATTRIBUTES.pack(
            _ATTRIBUTES.size, self.policy, flags, self.nice, self.priority, *self.deadline, *self.clamps
        )

    def differences(self, other: Self) -> list[str]:
        """How the scheduling of another thread, of a destination, differs."""
        found = []
        for name in self._fields:
            ours, theirs = getattr(self, name), getattr(other, name)
            if name == "policy":
                ours, theirs = _POLICIES.get(ours, ours), _POLICIES.get(theirs, theirs)
            if name == "affinity":
                ours, theirs = sorted(ours), sorted(theirs)
            if ours != theirs and not (name == "timer_slack" and "" in (ours, theirs)):
                what = name.replace("_", " ")
                found.append(f"{what} is {in_words(theirs)} in the new QEMU, {in_words(ours)} in the old one")
        return found


class Roles(NamedTuple):
    """
    The roles of the threads of a QEMU.

    :ivar named: role → id of the threads whose role is known.
    :ivar others: ids of all others.
    :ivar moved: of a source: maps (controllers, path) of a cgroup to the path of the one that a thread of the
        destination is to be in.
    """

    named: Mapping[str, int]
    others: tuple[int, ...]
    moved: Callable[[str, str], str] = lambda controllers, path: path

    def groups(self, thread: int) -> dict[str, str]:
        """The cgroups in which the counterpart of one of its threads is to be, controllers → path."""
        return {controllers: self.moved(controllers, path) for controllers, path in _groups(thread).items()}

    @property
    def quiet(self) -> int:
        """The thread that affects the guest least if it stops for a moment."""
        return next(iter(self.others), self.named["first thread"])

    @classmethod
    async def of(cls, monitor: Commands, process: QemuProcess) -> Self:
        """:raises SevhopError: QEMU does not answer, or its answers make no sense."""
        with protocol_errors(monitor.name):
            vcpus = await monitor.execute("query-cpus-fast")
            iothreads = await monitor.execute("query-iothreads")
            named = {"first thread": process.pid}
            named |= {f"vCPU {int(one['cpu-index'])}": int(one["thread-id"]) for one in vcpus}
            named |= {f"iothread {one['id']}": int(one["thread-id"]) for one in iothreads}
        threads = process.threads
        # Threads of other processes are ignored, whatever QEMU reports.
        named = {name: thread for name, thread in named.items() if thread in threads}
        return cls(named, tuple(thread for thread in threads if thread not in named.values()))


def hand_over(source: Roles, destination: Roles) -> list[str]:
    """
    Have the threads of a destination scheduled like those of the source, and verify that they are.

    :return: what differs, and why.
    :raises ProcessError: one of the two has exited.
    """
    found = []
    first = Thread.of(source.named["first thread"])
    pairs = [(name, thread, destination.named.get(name)) for name, thread in source.named.items()]
    for name, ours, theirs in pairs:
        if theirs is not None:
            found += _hand_over(name, Thread.of(ours), source.groups(ours), theirs)
    groups = source.groups(source.named["first thread"])
    for thread in destination.others:
        with contextlib.suppress(ProcessError):  # worker threads are created and exit
            found += _hand_over("another thread", first, groups, thread)
    return list(dict.fromkeys(found))


def _hand_over(name: str, wanted: Thread, groups: dict[str, str], thread: int) -> list[str]:
    reason = ""
    try:
        for controllers, path in groups.items():
            if _groups(thread).get(controllers) != path:
                _join(controllers, path, thread)
        wanted.apply(thread)
    except (OSError, SevhopError) as err:
        reason = f" ({getattr(err, 'strerror', None) or err})"
    found = wanted.differences(Thread.of(thread))
    if groups != _groups(thread):
        found.append("cgroup is not that of the old QEMU")
    return [f"{name}: {text}{reason}" for text in found]


def _groups(thread: int) -> dict[str, str]:
    """The cgroups of one thread, controllers → path."""
    try:
        lines = Path(f"/proc/{thread}/cgroup").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as err:
        raise ProcessError(f"cannot read the cgroups of thread {thread}: {err.strerror}") from err
    return {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}


def _join(controllers: str, path: str, thread: int) -> None:
    directory = cgroup_directory(controllers, path)
    name = "tasks" if controllers else "cgroup.threads"
    (directory / name).write_text(str(thread), encoding="ascii")


def cgroup_directory(controllers: str, path: str) -> Path:
    """
    The directory of a cgroup, by our mounts (proc(5), mountinfo).

    :raises SevhopError: its hierarchy is not mounted.
    """
    mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    for line in mounts.splitlines():
        mount, _, rest = line.partition(" - ")
        kind, _, options = rest.split(" ", 2)
        root, point = mount.split(" ")[3:5]
        wanted = {"cgroup2": not controllers, "cgroup": set(controllers.split(",")) <= set(options.split(","))}
        if wanted.get(kind):
            inside = os.path.relpath(path, root)
            if not inside.startswith(".."):
                return Path(point, inside)
    raise SevhopError(f"cannot find the cgroup {controllers}:{path} of QEMU: not mounted", "mount its hierarchy")


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
