"""
A QEMU process, read from outside: what it was started with, what it has open, what it has mapped.

Everything is read from ``/proc/PID`` (proc(5)); descriptors are duplicated by ``pidfd_getfd(2)``, which needs the
right to ptrace the process. Its life cycle is that of any process: :mod:`sevhop_qmp.pidfd_process`.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import os
import re
import resource
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import NamedTuple

from .credentials import Credentials
from .errors import ProcessError
from .pidfd_process import PidfdProcess

_SYS_PIDFD_GETFD = 438
_libc = ctypes.CDLL(None, use_errno=True)

#: ``/proc/PID/fd`` link of a KVM VM descriptor.
KVM_VM_LINK = "anon_inode:kvm-vm"

#: From the last byte of an entry of pagemap: 1 if the page is present or swapped (bits 63 and 62), otherwise 0.
_PAGE_THERE = bytes(flags >= 1 << 6 for flags in range(256))

_LIMITS: Mapping[str, int] = {
    "Max cpu time": resource.RLIMIT_CPU,
    "Max file size": resource.RLIMIT_FSIZE,
    "Max data size": resource.RLIMIT_DATA,
    "Max stack size": resource.RLIMIT_STACK,
    "Max core file size": resource.RLIMIT_CORE,
    "Max resident set": resource.RLIMIT_RSS,
    "Max processes": resource.RLIMIT_NPROC,
    "Max open files": resource.RLIMIT_NOFILE,
    "Max locked memory": resource.RLIMIT_MEMLOCK,
    "Max address space": resource.RLIMIT_AS,
    "Max file locks": 10,  # RLIMIT_LOCKS, which Python has no name for
    "Max pending signals": resource.RLIMIT_SIGPENDING,
    "Max msgqueue size": resource.RLIMIT_MSGQUEUE,
    "Max nice priority": resource.RLIMIT_NICE,
    "Max realtime priority": resource.RLIMIT_RTPRIO,
    "Max realtime timeout": resource.RLIMIT_RTTIME,
}


class Descriptor(NamedTuple):
    """An open descriptor of another process: its number there, and the target of its link in /proc."""

    number: int
    target: str


class MemoryMapping(NamedTuple):
    """One line of ``/proc/PID/maps``; addresses in bytes, ``end`` exclusive. ``inode`` is 0 for anonymous memory."""

    start: int
    end: int
    permissions: str
    offset: int
    device: str
    inode: int
    path: str

    @property
    def shared(self) -> bool:
        """Whether writes reach the file behind the mapping (``s``), or stay private (``p``)."""
        return self.permissions.endswith("s")


class OnDisk(enum.Enum):
    """What has become of the file that a process was started from."""

    UNCHANGED = "unchanged"
    REPLACED = "replaced"
    DELETED = "deleted"


class QemuProcess(PidfdProcess):
    """One QEMU process, source or destination."""

    # -- what it was started with ----------------------------------------------------------------

    @cached_property
    def executable(self) -> str:
        """Path of the program; `` (deleted)`` is appended by the kernel when the file was replaced on disk."""
        return self._link("exe")

    @property
    def on_disk(self) -> OnDisk:
        """
        What has become of that file. Neither content nor version is compared: another file is another QEMU.

        :raises ProcessError: the process has exited.
        """
        path = path_on_disk(self.executable)
        try:
            running = os.stat(self._proc / "exe")
        except OSError as err:
            raise self._unreadable("exe", err) from err
        try:
            return OnDisk.UNCHANGED if os.path.samestat(running, os.stat(path)) else OnDisk.REPLACED
        except OSError:
            return OnDisk.DELETED

    @cached_property
    def command_line(self) -> list[str]:
        """Arguments, the program first."""
        return [os.fsdecode(word) for word in self._read("cmdline").split(b"\0")[:-1]]

    @cached_property
    def environment(self) -> dict[str, str]:
        """Environment at the start of the program."""
        pairs = (os.fsdecode(word).partition("=") for word in self._read("environ").split(b"\0") if word)
        return {name: value for name, _, value in pairs}

    @property
    def working_directory(self) -> str:
        """Where relative paths of its command line start."""
        return self._link("cwd")

    def open_working_directory(self) -> int:
        """
        A descriptor of it (O_PATH), which stays valid when it is renamed. The caller closes it.

        :raises ProcessError: the process has exited, or permission is denied.
        """
        try:
            return os.open(self._proc / "cwd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as err:
            raise self._unreadable("cwd", err) from err

    @property
    def credentials(self) -> Credentials:
        """Effective user and group, supplementary groups, umask, effective capabilities."""
        fields = self.status
        return Credentials(
            uid=int(fields["Uid"].split()[1]),
            gid=int(fields["Gid"].split()[1]),
            groups=tuple(int(group) for group in fields["Groups"].split()),
            umask=int(fields["Umask"], 8),
            capabilities=int(fields["CapEff"], 16),
        )

    @property
    def limits(self) -> dict[int, tuple[int, int]]:
        """Its resource limits (getrlimit(2)): RLIMIT_* → (soft, hard), -1 for unlimited."""
        limits = {}
        for line in self._read("limits").decode().splitlines():
            for label, number in _LIMITS.items():
                if line.startswith(label):
                    soft, hard = line[len(label) :].split()[:2]
                    limits[number] = (_limit(soft), _limit(hard))
        return limits

    @property
    def cgroups(self) -> list[tuple[str, str]]:
        """(controllers, path) of each hierarchy; controllers are empty for cgroup v2."""
        rows = (line.split(":", 2) for line in os.fsdecode(self._read("cgroup")).split("\n") if line)
        return [(controllers, path) for _, controllers, path in rows]

    def namespace(self, kind: str) -> str:
        """Identity of a namespace, such as ``mnt`` or ``net``; equal strings are the same namespace."""
        return self._link(f"ns/{kind}")

    @property
    def confinement(self) -> str:
        """Its label in the security module (AppArmor, SELinux), such as ``unconfined``; empty without one."""
        with contextlib.suppress(ProcessError):
            return self._read("attr/current").rstrip(b"\0\n").decode(errors="replace")
        return ""

    @property
    def private_memory(self) -> int:
        """Bytes of its resident anonymous memory."""
        return int(self.status.get("RssAnon", "0 kB").split()[0]) << 10

    def fact(self, name: str) -> str:
        """A file of ``/proc/PID`` with one line of text in it; empty where the kernel has no such file."""
        try:
            return (self._proc / name).read_text(errors="replace").strip()
        except FileNotFoundError:
            if self.alive:
                return ""
            raise ProcessError(f"process {self.pid} has exited") from None
        except OSError as err:
            raise self._unreadable(name, err) from err

    @property
    def root(self) -> str:
        """Its root directory, ``/`` unless it has called chroot."""
        return self._link("root")

    @property
    def status(self) -> dict[str, str]:
        """The fields of ``/proc/PID/status``, by name."""
        # QEMU can set the name in it to any bytes; the kernel escapes line feeds, and nothing else.
        lines = os.fsdecode(self._read("status")).split("\n")
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}

    # -- what it has open ------------------------------------------------------------------------

    def descriptors(self) -> list[Descriptor]:
        """Open descriptors, by number."""
        found = []
        try:
            numbers = sorted(int(name) for name in os.listdir(self._proc / "fd"))
        except OSError as err:
            raise self._unreadable("fd", err) from err
        for number in numbers:
            # One that has been closed meanwhile is of no interest.
            with contextlib.suppress(OSError):
                found.append(Descriptor(number, os.readlink(self._proc / "fd" / str(number))))
        return found

    def descriptor_info(self, number: int) -> dict[str, str]:
        """
        What the kernel reports of one of its descriptors (proc(5), ``fdinfo``), by name; empty if it has no such one.

        :raises ProcessError: it has exited.
        """
        lines = self.fact(f"fdinfo/{number}").splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}

    def vm_descriptor(self) -> int | None:
        """Number of the KVM VM descriptor; None under TCG."""
        return next((fd.number for fd in self.descriptors() if fd.target == KVM_VM_LINK), None)

    def duplicate(self, number: int) -> int:
        """
        A duplicate of one of its descriptors, close-on-exec (pidfd_getfd(2)).

        :raises ProcessError: it has exited, has no such descriptor, or permission is denied.
        """
        fd = int(_libc.syscall(_SYS_PIDFD_GETFD, self._pidfd, number, 0))
        if fd < 0:
            code = ctypes.get_errno()
            reason = os.strerror(code)
            hint = "run sevhop as root" if code == errno.EPERM else ""
            raise ProcessError(f"cannot duplicate descriptor {number} of process {self.pid}: {reason}", hint)
        return fd

    # -- what it has mapped ----------------------------------------------------------------------

    def mappings(self) -> Iterator[MemoryMapping]:
        """Its memory mappings, by address."""
        for line in filter(None, os.fsdecode(self._read("maps")).split("\n")):
            area, permissions, offset, device, inode, *path = line.split(None, 5)
            start, _, end = area.partition("-")
            yield MemoryMapping(
                int(start, 16),
                int(end, 16),
                permissions,
                int(offset, 16),
                device,
                int(inode),
                path[0] if path else "",
            )

    @contextlib.contextmanager
    def memory(self, *, write: bool = False) -> Iterator[int]:
        """Descriptor of ``/proc/PID/mem``, to be read (and written) by address with pread and pwrite."""
        try:
            fd = os.open(f"{self._proc}/mem", (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC)
        except OSError as err:
            raise self._unreadable("mem", err) from err
        try:
            yield fd
        finally:
            os.close(fd)

    def populated(self, start: int, length: int) -> list[tuple[int, int]]:
        """
        Those parts of a mapped range that have pages (Documentation/admin-guide/mm/pagemap.rst), as (first, end)
        offsets from ``start``. The rest has never been touched.
        """
        page = resource.getpagesize()
        try:
            fd = os.open(f"{self._proc}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            try:
                table = os.pread(fd, -(-length // page) * 8, start // page * 8)
            finally:
                os.close(fd)
        except OSError as err:
            raise self._unreadable("pagemap", err) from err
        # The flags are in the last of the 8 bytes of each entry. A guest may wait for this: no loop over pages.
        there = table[7::8].translate(_PAGE_THERE)
        areas: list[tuple[int, int]] = []
        end = 0
        while (first := there.find(1, end)) >= 0:
            end = there.find(0, first)
            if end < 0:
                end = len(there)
            areas.append((first * page, min(end * page, length)))
        return areas


def _limit(word: str) -> int:
    return resource.RLIM_INFINITY if word == "unlimited" else int(word)


_DELETED = re.compile(r" \(deleted\)$")


def path_on_disk(link: str) -> str:
    """A ``/proc`` link target without the kernel's `` (deleted)`` mark."""
    return _DELETED.sub("", link)
