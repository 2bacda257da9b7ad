"""
Cgroups of its own for a QEMU beside libvirt, like those of the domain.

When libvirt shuts a domain off, it has everything in the domain's cgroups killed, and removes them. So a transit is in
copies, which lie beside them: with the same limits, and the same groups for vCPUs, I/O threads and the rest. Where
systemd manages them they are in a scope, which systemd leaves to us below its top (``Delegate=``, systemd.scope(5)).
A domain whose QEMU is in no cgroup of its own has no limits there, and nobody kills what is in it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Self

from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import QemuProcess

from . import host_shutdown, systemd
from .cgroup_memory import OF_DOMAINS
from .scheduling import cgroup_directory

#: Settings of a cgroup, in the order in which they must be made (Documentation/admin-guide/cgroup-v{1,2}).
_SETTINGS = (
    *("cpuset.cpus", "cpuset.mems", "cpuset.cpus.partition"),
    *("cpu.shares", "cpu.cfs_period_us", "cpu.cfs_quota_us", "cpu.weight", "cpu.max"),
    *("cpu.uclamp.min", "cpu.uclamp.max"),
    *("blkio.weight", "blkio.bfq.weight", "blkio.weight_device"),
    *(f"blkio.throttle.{what}_device" for what in ("read_bps", "write_bps", "read_iops", "write_iops")),
    *("io.weight", "io.bfq.weight", "io.max", "io.latency"),
    *("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.soft_limit_in_bytes"),
    *("memory.max", "memory.high", "memory.low", "memory.min", "memory.swap.max", "pids.max"),
)
#: What a QEMU has a right to, cgroup v1: read from one file, and written to two others.
_DEVICES, _DENY, _ALLOW = "devices.list", "devices.deny", "devices.allow"
_TYPE, _CONTROLLERS = "cgroup.type", "cgroup.subtree_control"
#: Prefix of the name of the cgroup of a transit.
_SCOPE = "sevhop-transit-"
#: Seconds for systemd to make a scope, and between two looks.
_SCOPE_TIMEOUT = 10.0
_POLL = 0.01
#: Seconds for a cgroup to become empty when its last process has exited.
_EMPTY_TIMEOUT = 2.0


class _Hierarchy(NamedTuple):
    """
    One hierarchy.

    :ivar top: path of the domain's cgroup; the process is there, or below.
    :ivar copy: path of the copy of that.
    """

    controllers: str
    top: str
    copy: str

    def directories(self) -> tuple[Path, Path]:
        """Those of the domain's cgroup and of its copy."""
        return cgroup_directory(self.controllers, self.top), cgroup_directory(self.controllers, self.copy)

    def moved(self, path: str) -> str:
        """The path of the copy of a cgroup."""
        inside = path == self.top or path.startswith(f"{self.top}/")
        return self.copy + path.removeprefix(self.top) if inside else path


class MachineCgroup:
    """
    Copies of the cgroups of a domain. Use :meth:`beside`, and :meth:`remove` them when nothing is in there any more.

    :ivar directories: the topmost of them.
    """

    def __init__(self, hierarchies: Sequence[_Hierarchy], paths: Sequence[tuple[str, str]], scope: str) -> None:
        self._hierarchies = hierarchies
        self._paths = paths
        self._scope = scope
        self.directories = [str(cgroup_directory(one.controllers, one.copy)) for one in hierarchies]

    @classmethod
    def beside(cls, source: QemuProcess) -> Self | None:
        """
        Decide where they are to be. None if the source is in no cgroup of a domain.

        :raises SevhopError: it has exited, or a hierarchy is not mounted.
        """
        scope = f"{_SCOPE}{secrets.token_hex(8)}.scope"
        found, paths = [], source.cgroups
        for controllers, path in paths:
            parts = path.split("/")
            if own := max((number for number, part in enumerate(parts) if _is_of_a_domain(part)), default=0):
                found.append(_Hierarchy(controllers, "/".join(parts[: own + 1]), "/".join([*parts[:own], scope])))
        return cls(found, paths, scope) if found else None

    def moved(self, controllers: str, path: str) -> str:
        """The path of the cgroup in which a thread is to be whose counterpart in the source is in another one."""
        for one in self._hierarchies:
            if one.controllers == controllers:
                return one.moved(path)
        return path

    def enter(self, pid: int) -> list[str]:
        """
        Make the copies, and put a process there.

        :return: a sentence for each setting that could not be copied.
        :raises SevhopError: they cannot be made.
        """
        try:
            if systemd.manages_host():
                self._make_scope(pid)
            for one in self._hierarchies:
                _make_tree(*one.directories())
            for controllers, path in self._paths:
                # A group whose controllers are to be enabled may not have processes (cgroup v2).
                if controllers == "":
                    _put(pid, self._outer(path))
            notes = [note for one in self._hierarchies for note in _copy(*one.directories())]
            for controllers, path in self._paths:
                _put(pid, cgroup_directory(controllers, self.moved(controllers, path)))
        except OSError as err:
            self.remove()
            where = f"{err.filename}: " if err.filename else ""
            raise SevhopError(f"cannot make cgroups for the transit: {where}{err.strerror}") from err
        except BaseException:
            self.remove()
            raise
        return notes

    def _outer(self, path: str) -> Path:
        """The innermost group around a threaded one that is not threaded itself; only from there one can enter it."""
        while _read(cgroup_directory("", path) / _TYPE) == "threaded":
            path = os.path.dirname(path)
        return cgroup_directory("", self.moved("", path))

    def _make_scope(self, pid: int) -> None:
        """Have systemd make a scope, and put the process there; it does the latter later."""
        slice_of = next(Path(one.copy).parent.name for one in self._hierarchies)
        unit = slice_of if slice_of.endswith(".slice") else "-.slice"
        call = ["busctl", "--quiet", "call", "org.freedesktop.systemd1", "/org/freedesktop/systemd1"]
        call += ["org.freedesktop.systemd1.Manager", "StartTransientUnit", "ssa(sv)a(sa(sv))", self._scope, "fail"]
        call += ["5", "PIDs", "au", "1", str(pid), "Slice", "s", unit, "Delegate", "b", "true"]
        call += ["Before", "as", str(len(host_shutdown.BEFORE)), *host_shutdown.BEFORE]
        call += ["CollectMode", "s", "inactive-or-failed", "0"]
        try:
            subprocess.run(call, check=True, capture_output=True, text=True, timeout=_SCOPE_TIMEOUT)
        except subprocess.TimeoutExpired as err:
            raise SevhopError(f"systemd makes no scope for the transit: no answer within {_SCOPE_TIMEOUT:g} s") from err
        except subprocess.CalledProcessError as err:
            reason = (err.stderr.strip() or f"busctl: exit status {err.returncode}").splitlines()[-1]
            raise SevhopError(f"systemd makes no scope for the transit: {reason}") from err
        except OSError as err:
            raise SevhopError(f"systemd makes no scope for the transit: busctl: {err.strerror}") from err
        deadline = time.monotonic() + _SCOPE_TIMEOUT
        while self._scope not in _read(Path(f"/proc/{pid}/cgroup")):
            if time.monotonic() > deadline:
                raise SevhopError(f"systemd has not put the transit into {self._scope} within {_SCOPE_TIMEOUT:g} s")
            time.sleep(_POLL)

    def remove(self) -> None:
        """Remove them, as far as nothing is in there. May be repeated."""
        remove(self.directories)


def of_transit(process: QemuProcess) -> list[str]:
    """
    The directories that were made for a transit, as :attr:`MachineCgroup.directories`.

    :raises SevhopError: it has exited, or a hierarchy is not mounted.
    """
    found = []
    for controllers, path in process.cgroups:
        parts = path.split("/")
        for number, part in enumerate(parts):
            if part.startswith(_SCOPE):
                found.append(str(cgroup_directory(controllers, "/".join(parts[: number + 1]))))
    return found


def _is_of_a_domain(name: str) -> bool:
    return name.startswith(OF_DOMAINS) and not name.endswith(".slice")


def remove(directories: Iterable[str]) -> None:
    """The same by their names, after a crash."""
    deadline = time.monotonic() + _EMPTY_TIMEOUT
    for directory in map(Path, directories):
        inner = sorted((path for path in directory.rglob("*") if path.is_dir()), key=lambda path: -len(path.parts))
        for path in [*inner, directory]:
            while path.is_dir():
                try:
                    path.rmdir()
                except OSError:
                    if time.monotonic() > deadline:
                        return
                    time.sleep(_POLL)


def _put(pid: int, group: Path) -> None:
    (group / "cgroup.procs").write_text(str(pid), encoding="ascii")


def _make_tree(source: Path, copy: Path) -> None:
    """Make copies of a cgroup, and of all below it."""
    copy.mkdir(exist_ok=True)
    for path in _inner(source):
        _make_tree(path, copy / path.name)


def _inner(group: Path) -> list[Path]:
    return sorted(path for path in group.iterdir() if path.is_dir())


def _copy(source: Path, copy: Path) -> list[str]:
    """Copy the settings of a cgroup, and of all below it. :return: a sentence for each that could not be copied."""
    notes = [note for name in _SETTINGS if (note := _copy_setting(source / name, copy / name))]
    notes += _copy_devices(source, copy)
    inner = _inner(source)
    for path in inner:
        if _read(path / _TYPE) == "threaded":
            (copy / path.name / _TYPE).write_text("threaded", encoding="ascii")
    if controllers := _read(source / _CONTROLLERS).split():
        (copy / _CONTROLLERS).write_text(" ".join(f"+{name}" for name in controllers), encoding="ascii")
    for path in inner:
        notes += _copy(path, copy / path.name)
    return notes


def _copy_setting(source: Path, copy: Path) -> str:
    wanted = _read(source)
    if not wanted or wanted == _read(copy):
        return ""
    with contextlib.suppress(OSError):
        for line in wanted.splitlines():
            _write(copy, line)
    found = _read(copy)
    return "" if found == wanted else f"{copy.name} of the transit is {found or 'missing'}, that of the domain {wanted}"


def _copy_devices(source: Path, copy: Path) -> list[str]:
    wanted = _read(source / _DEVICES)
    if wanted == _read(copy / _DEVICES):
        return []
    try:
        _write(copy / _DENY, "a")
        for line in wanted.splitlines():
            _write(copy / _ALLOW, line)
    except OSError as err:
        return [f"the devices that the transit may use cannot be limited: {err.strerror}"]
    return []


def _write(path: Path, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
