"""
A QEMU process, read from outside: what it was started with, what it has open, what it has mapped.

Everything is read from ``/proc/PID`` (proc(5)); descriptors are duplicated by ``pidfd_getfd(2)``, which needs the
right to ptrace the process. The process is identified by a pidfd, so a reused pid is never mistaken for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import enum
import os
import re
import resource
import select
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from .errors import ProcessError
from .thread_states import ENDED, HALTED, ThreadStates

_SYS_PIDFD_GETFD = 438
_CAP_IPC_LOCK = 14
_libc = ctypes.CDLL(None, use_errno=True)

#: ``/proc/PID/fd`` link of a KVM VM descriptor.
KVM_VM_LINK = "anon_inode:kvm-vm"

#: Seconds between two polls of a process that has exited but is not reaped: there is no notification for that.
_REAPED_POLL = 0.001
#: Seconds between two polls of the state of its threads, after as many polls without a pause.
_STATE_POLL = 0.001
_BUSY_POLLS = 50

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

#: A stream socket's address in a form that compares: (family, path) or (family, host, port).
Address = tuple[int, str] | tuple[int, str, int]


@dataclass(frozen=True)
class Descriptor:
    """An open descriptor of another process: its number there, and the target of its link in /proc."""

    number: int
    target: str


@dataclass(frozen=True)
class MemoryMapping:
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


@dataclass(frozen=True)
class Credentials:
    """What the process runs as. ``capabilities`` is the effective set, as a bit mask."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    umask: int
    capabilities: int = 0

    @property
    def may_lock_memory(self) -> bool:
        """Whether it is exempt from the limit of locked memory."""
        return bool(self.capabilities >> _CAP_IPC_LOCK & 1)

    def may(self, access: str, path: Path) -> bool:
        """
        Whether this user can open or run a file; tested as that user, since directories count as well.

        :param access: letters of ``rwx``.
        """
        other = (self.uid, self.gid) != (os.geteuid(), os.getegid())
        tests = " -a ".join(f"-{letter} {{0}}" for letter in access).split()
        done = subprocess.run(
            [shutil.which("test") or "/usr/bin/test", *(word.format(path) for word in tests)],
            user=self.uid if other else None,
            group=self.gid if other else None,
            extra_groups=self.groups if other else None,
            check=False,
        )
        return done.returncode == 0


class OnDisk(enum.Enum):
    """What has become of the file that a process was started from."""

    UNCHANGED = "unchanged"
    REPLACED = "replaced"
    DELETED = "deleted"


class QemuProcess:
    """
    One QEMU process, source or destination.

    :ivar pid: its pid in our pid namespace.
    """

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self._pidfd = pidfd
        self._proc = Path("/proc") / str(pid)

    @classmethod
    def open(cls, pid: int) -> Self:
        """:raises ProcessError: there is no such process."""
        try:
            return cls(pid, os.pidfd_open(pid))
        except OSError as err:
            raise ProcessError(f"process {pid}: {err.strerror}") from err

    def close(self) -> None:
        """Close the pidfd. The process is not affected."""
        os.close(self._pidfd)

    def fileno(self) -> int:
        """The pidfd, which stays ours."""
        return self._pidfd

    # -- life cycle ------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether it has a thread left. A zombie has none, unless only its first thread has exited."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return not poll.poll(0)  # pidfd_open(2): it polls as readable when all threads have exited

    @property
    def threads(self) -> list[int]:
        """The ids of its threads; none when it has exited."""
        with contextlib.suppress(OSError):
            return [int(task.name) for task in (self._proc / "task").iterdir()]
        return []

    def kill(self) -> None:
        """SIGKILL; nothing happens when it has exited already."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def halt(self) -> None:
        """SIGSTOP: all its threads halt within a moment, until :meth:`thaw` or :meth:`kill`."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGSTOP)

    async def freeze(self, timeout: float, states: ThreadStates | None = None) -> bool:
        """
        :meth:`halt`, and wait until they have. Its monitors do not answer any more.

        :param states: of its threads, opened before, which is quicker.
        :return: False when that took too long, or it has exited.
        """
        deadline = asyncio.get_running_loop().time() + timeout
        polls = 0
        self.halt()
        with contextlib.suppress(OSError), contextlib.ExitStack() as opened:
            states = states or opened.enter_context(ThreadStates(self.pid))
            while not (seen := states.read()) <= HALTED:
                if asyncio.get_running_loop().time() > deadline:
                    return False
                # It takes some hundredths of a millisecond, and a guest may be waiting.
                polls += 1
                await asyncio.sleep(0 if polls < _BUSY_POLLS else _STATE_POLL)
            return not seen <= ENDED
        return False

    def thread_states(self) -> ThreadStates:
        """
        Open them for :meth:`freeze`.

        :raises ProcessError: it has exited.
        """
        try:
            return ThreadStates(self.pid)
        except OSError as err:
            raise ProcessError(f"process {self.pid} has exited") from err

    @property
    def frozen(self) -> bool:
        """Whether it is halted, by :meth:`freeze` or by somebody else."""
        with contextlib.suppress(OSError), ThreadStates(self.pid) as states:
            seen = states.read()
            return seen <= HALTED and not seen <= ENDED and self.alive
        return False

    def thaw(self) -> None:
        """SIGCONT; nothing happens when it is not halted, or has exited."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGCONT)

    async def wait(self, timeout: float) -> bool:
        """Wait until the process has exited. :return: False when it has not within ``timeout`` seconds."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(self._pidfd, ended.set)
        try:
            async with asyncio.timeout(timeout):
                await ended.wait()
        except TimeoutError:
            return False
        finally:
            loop.remove_reader(self._pidfd)
        return True

    @property
    def start_time(self) -> int:
        """
        When it was started, in clock ticks since boot. No two processes have the same pid and start time.

        :raises ProcessError: it has exited.
        """
        try:
            return int(self._stat()[19])
        except OSError as err:
            raise self._unreadable("stat", err) from err

    def _stat(self) -> list[str]:
        """The fields of ``/proc/PID/stat`` from the third on; the second may have blanks and parentheses in it."""
        return (self._proc / "stat").read_text(errors="replace").rpartition(")")[2].split()

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
            reason = os.strerror(ctypes.get_errno())
            raise ProcessError(f"cannot duplicate descriptor {number} of process {self.pid}: {reason}")
        return fd

    def listeners(self) -> dict[Address, int]:
        """Duplicates of its listening stream sockets, by address. The caller closes them."""
        found: dict[Address, int] = {}
        for descriptor in self.descriptors():
            if not descriptor.target.startswith("socket:"):
                continue
            sock = socket.socket(fileno=self.duplicate(descriptor.number))
            if (address := listening_address(sock)) is None or address in found:
                sock.close()
            else:
                found[address] = sock.detach()
        return found

    def connections(self, name: str) -> list[int]:
        """
        Duplicates of its connected UNIX sockets whose own path ends in a file name. The caller closes them.

        Their peers do not notice the exit of the process for as long as the duplicates are open.
        """
        found = []
        for descriptor in self.descriptors():
            if not descriptor.target.startswith("socket:"):
                continue
            sock = socket.socket(fileno=self.duplicate(descriptor.number))
            own = sock.getsockname() if sock.family == socket.AF_UNIX else ""
            if isinstance(own, str) and own.endswith(f"/{name}") and listening_address(sock) is None:
                found.append(sock.detach())
            else:
                sock.close()
        return found

    async def wait_reaped(self, timeout: float) -> bool:
        """Wait until it has exited and was reaped by its parent. :return: False when that took too long."""
        deadline = asyncio.get_running_loop().time() + timeout
        if not await self.wait(timeout):
            return False
        while (self._proc / "stat").exists():
            if asyncio.get_running_loop().time() > deadline:
                return False
            await asyncio.sleep(_REAPED_POLL)
        return True

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

    # -- reading /proc ---------------------------------------------------------------------------

    def _read(self, name: str) -> bytes:
        try:
            return (self._proc / name).read_bytes()
        except OSError as err:
            raise self._unreadable(name, err) from err

    def _link(self, name: str) -> str:
        try:
            return os.readlink(self._proc / name)
        except OSError as err:
            raise self._unreadable(name, err) from err

    def _unreadable(self, name: str, err: OSError) -> ProcessError:
        if not self.alive:
            return ProcessError(f"process {self.pid} has exited")
        hint = "run sevhop as root" if isinstance(err, PermissionError) else ""
        return ProcessError(f"/proc/{self.pid}/{name}: {err.strerror}", hint)


def listening_address(sock: socket.socket) -> Address | None:
    """The address of a listening stream socket; None for every other socket."""
    try:
        if sock.type != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return None
        name = sock.getsockname()
    except OSError:
        return None
    if sock.family == socket.AF_UNIX:
        # Abstract names come as bytes; with surrogates they compare like paths do.
        return (int(sock.family), os.fsdecode(name))
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        return (int(sock.family), name[0], name[1])
    return None


def address_from_sockaddr(raw: bytes) -> Address | None:
    """
    The same form from a raw ``struct sockaddr`` (unix(7), ip(7), ipv6(7)).

    :return: None for a family that is not supported, or for bytes that are no such address.
    """
    if len(raw) < 2:
        return None
    family = int.from_bytes(raw[:2], "little")
    if family == socket.AF_UNIX:
        path = raw[2:]
        if not path:
            return None
        return (family, os.fsdecode(path if path[:1] == b"\0" else path.split(b"\0", 1)[0]))
    if family == socket.AF_INET and len(raw) >= 8:
        return (family, socket.inet_ntop(socket.AF_INET, raw[4:8]), int.from_bytes(raw[2:4], "big"))
    if family == socket.AF_INET6 and len(raw) >= 24:
        return (family, socket.inet_ntop(socket.AF_INET6, raw[8:24]), int.from_bytes(raw[2:4], "big"))
    return None


def _limit(word: str) -> int:
    return resource.RLIM_INFINITY if word == "unlimited" else int(word)


_DELETED = re.compile(r" \(deleted\)$")


def path_on_disk(link: str) -> str:
    """A ``/proc`` link target without the kernel's `` (deleted)`` mark."""
    return _DELETED.sub("", link)
