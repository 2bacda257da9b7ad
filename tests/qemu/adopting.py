"""
A destination without a hop: a stock QEMU with adopt.so, and a keeper whose answers the test decides.

The "source" is whatever the test hands out: memory that it made itself, sockets that it listens on.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import hashlib
import os
import socket
import struct
import subprocess
import termios
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
from qemu.qmp import EventListener, Message
from sevhop_qmp import adopt, adopt_library
from sevhop_qmp.errors import MonitorError
from sevhop_qmp.monitor import Monitor
from sevhop_qmp.run_mark import RunMark

from tests.support.guests import emulators
from tests.support.guests.machine import Q35, Accelerator

#: Size of the guests' memory, bytes.
RAM = 32 << 20
#: The name of every memfd that a memory-backend-memfd makes.
BACKEND = "memory-backend-memfd"
#: Seconds until QEMU must be up, or must have exited.
TIMEOUT = 60.0

#: The test runs with each QEMU, as the fixture ``qemu``.
EVERY_EMULATOR = pytest.mark.parametrize(
    "qemu", [emulators.OLD, emulators.NEW, emulators.UNSTABLE], indirect=True, ids=lambda label: f"qemu-{label}"
)


class Memory:
    """A guest's memory: a memfd full of noise, as a source would hold it. Use it as a context manager."""

    def __init__(self, size: int = RAM, *, seal: bool = True) -> None:
        self.size = size
        self.fd = os.memfd_create(BACKEND, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, size)
        page = os.urandom(4096)
        for offset in range(0, size, 1 << 20):
            # Every page differs from the next, and from zeros.
            os.pwrite(self.fd, b"".join(page[n:] + page[:n] for n in range(256)), offset)
        if seal:
            # As QEMU's seal=on, the default.
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)

    @property
    def inode(self) -> int:
        return os.fstat(self.fd).st_ino

    def read(self, address: int, length: int) -> bytes:
        return os.pread(self.fd, length, address)

    def digest(self) -> str:
        return hashlib.sha256(self.read(0, self.size)).hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


@dataclass
class Keeper:
    """
    The other end of SEVHOP_KEEPER. Replies for a source with these parts.

    :ivar memory: what a ``memfd`` request for the N-th memory backend gets.
    :ivar listeners: what a ``listener`` request gets.
    :ivar run_mark: what a ``run-mark`` request gets.
    :ivar stream: what a ``stream`` request gets: a pipe, and a descriptor of the file whose place it takes.
    :ivar override: called first; its reply is sent unless it is None. ``b""`` closes the connection.
    :ivar requests: what was requested.
    """

    memory: Sequence[Memory] = ()
    listeners: Sequence[socket.socket] = ()
    context: str = "none"
    source: str = "running"
    more: str = ""
    run_mark: RunMark | None = None
    stream: tuple[int, int] | None = None
    override: Callable[[str], bytes | None] = lambda request: None
    requests: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def revoke_start(self) -> None:
        """Accept no notification any more."""
        self._ours.shutdown(socket.SHUT_RD)

    def __exit__(self, *_: object) -> None:
        self.theirs.close()
        with contextlib.suppress(OSError):
            self._ours.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._ours.close()

    def _serve(self) -> None:
        serve(self._ours, self)

    def answer(self, request: str) -> tuple[bytes, int | None]:
        self.requests.append(request)
        decided = self.override(request)
        if decided is not None:
            return decided, None
        match request.split(" ", 2):
            case ["hello", "1"]:
                return f"ok context={self.context} source={self.source}{self.more}".encode(), None
            case ["memfd", number, name] if name == BACKEND and int(number) < len(self.memory):
                memory = self.memory[int(number)]
                return f"fd {memory.size}".encode(), memory.fd
            case ["listener", address]:
                for listener in self.listeners:
                    if sockaddr(listener).hex() == address:
                        return b"fd", listener.fileno()
            case ["run-mark"] if self.run_mark is not None:
                return b"fd", self.run_mark.fileno()
            case ["stream"] if self.stream is not None:
                pipe, image = self.stream
                file = os.fstat(image)
                return f"fd {file.st_dev} {file.st_ino}".encode(), pipe
        return b"none", None


def serve(connection: socket.socket, keeper: Keeper) -> None:
    """Answer requests until the other side hangs up, or the keeper does."""
    with contextlib.suppress(OSError):
        while request := connection.recv(4096):
            text, fd = keeper.answer(request.decode("ascii"))
            if request == b"run":
                continue  # there is no reply to this
            if not text:
                connection.shutdown(socket.SHUT_RDWR)
                return
            socket.send_fds(connection, [text], [] if fd is None else [fd])


def sockaddr(listener: socket.socket) -> bytes:
    """The address of a socket as getsockname(2) gives it."""
    address = ctypes.create_string_buffer(128)
    length = ctypes.c_uint32(128)
    if ctypes.CDLL(None).getsockname(listener.fileno(), address, ctypes.byref(length)):
        raise OSError("getsockname")
    return address.raw[: length.value]


def machine(
    accelerator: Accelerator, *words: str, backend: str = "", size: int = RAM, incoming: bool = True
) -> list[str]:
    """The command line of a small paused machine whose memory is one shared memfd."""
    mib = size >> 20
    return [
        *["-nodefaults", "-no-user-config", "-display", "none", "-accel", accelerator, "-cpu", "qemu64"],
        *["-machine", f"{Q35},memory-backend=ram0", "-m", f"{mib}M", "-S"],
        *["-object", f"memory-backend-memfd,id=ram0,size={mib}M,share=on{backend}"],
        *(["-incoming", "defer"] if incoming else []),
        *words,
    ]


def preloaded(keeper: str, stderr: int | None = None, more: str = "") -> dict[str, str]:
    """The environment of a destination."""
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    return {**environment, **adopt_library.environment(keeper, stderr, {"LD_PRELOAD": more} if more else None)}


class Destination:
    """A running QEMU and its monitor, used without a coroutine. A context manager: it is killed at the end."""

    def __init__(
        self,
        command: Sequence[str | Path],
        environment: Mapping[str, str],
        keep: Sequence[int] = (),
    ) -> None:
        self._runner = asyncio.Runner()
        ours, theirs = socket.socketpair()
        self.process = subprocess.Popen(
            [*command, "-chardev", f"socket,id=private,fd={theirs.fileno()}", "-mon", "chardev=private,mode=control"],
            env=environment,
            pass_fds=[*keep, theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        theirs.close()
        try:
            self.monitor = self._runner.run(Monitor.connect(ours, greeting_timeout=TIMEOUT))
        except MonitorError as err:
            ours.close()
            self._runner.close()
            self.process.kill()
            raise AssertionError(f"QEMU did not start: {log_lines(self.process.communicate()[1])}") from err

    @classmethod
    def adopting(
        cls, emulator: Path | str, arguments: Sequence[str], keeper: Keeper, more: str = "", keep: Sequence[int] = ()
    ) -> Self:
        """Start a QEMU that asks a keeper; `more` is what else it preloads, `keep` what it inherits."""
        return cls(
            [emulator, *arguments],
            preloaded(f"fd:{keeper.theirs.fileno()}", more=more),
            [keeper.theirs.fileno(), *keep],
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.run(self.monitor.close())
        self.kill()

    @property
    def pid(self) -> int:
        return self.process.pid

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stderr:
            self.process.stderr.close()
        self._runner.close()

    def exited(self) -> tuple[int, list[str]]:
        """Wait for the exit: the exit status, and the :func:`log_lines`."""
        _, stderr = self.process.communicate(timeout=TIMEOUT)
        return self.process.returncode, log_lines(stderr)

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        return self._runner.run(self.monitor.execute(command, arguments))

    def hmp(self, line: str) -> str:
        return self._runner.run(self.monitor.hmp(line))

    def send_fd(self, name: str, fd: int) -> None:
        self._runner.run(self.monitor.send_fd(name, fd))

    @contextlib.contextmanager
    def events(self, *names: str) -> Iterator[EventListener]:
        """Collect events, for :meth:`next_event`."""
        with self.monitor.events(*names) as listener:
            yield listener

    def next_event(self, listener: EventListener) -> Message:
        return self._runner.run(self.monitor.next_event(listener, timeout=TIMEOUT))

    def announce(self) -> adopt.Announcement:
        return self._runner.run(adopt.announce(self.monitor))

    def status(self) -> adopt.AdoptStatus:
        return self._runner.run(adopt.adopt_status(self.monitor))

    def adopt_ram(self) -> adopt.AdoptedRam:
        return self._runner.run(adopt.adopt_ram(self.monitor))

    def adopt_ram_with(self, stream: int, header_size: int) -> adopt.AdoptedRam:
        """... when the first byte after the header arrives in a pipe."""
        self.send_fd("stream", stream)
        return self._runner.run(adopt.adopt_ram(self.monitor, "stream", header_size))

    def finish(self) -> None:
        self._runner.run(adopt.finish(self.monitor))

    def move_from(self, fd: int) -> adopt.MoveResult:
        self.send_fd("source", fd)
        return self._runner.run(adopt.move_from(self.monitor, "source"))

    def mapping(self, memory: Memory) -> list[str]:
        """How a memory is mapped: the permission column of /proc/PID/maps, for each mapping."""
        lines = [line.split() for line in Path(f"/proc/{self.pid}/maps").read_text().splitlines()]
        return [words[1] for words in lines if int(words[4]) == memory.inode and f"/memfd:{BACKEND}" in words]

    def mapping_flags(self, inode: int) -> set[str]:
        """The flags of the mapping of a memfd ("VmFlags" in /proc/PID/smaps)."""
        return set(self._smaps(inode)["VmFlags:"])

    def copied(self, memory: Memory) -> int:
        """How much of a memory's mapping is pages of the destination's own, bytes."""
        return int(self._smaps(memory.inode)["Anonymous:"][0]) << 10

    def _smaps(self, inode: int) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        inside = False
        for line in Path(f"/proc/{self.pid}/smaps").read_text().splitlines():
            words = line.split()
            if not words[0].endswith(":"):
                inside = int(words[4]) == inode and f"/memfd:{BACKEND}" in words
            elif inside:
                found[words[0]] = words[1:]
        assert found, f"inode {inode} is not mapped"
        return found


def unread(pipe: int) -> int:
    """How much is in a pipe, bytes."""
    return int(struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))[0])


def log_lines(stderr: bytes) -> list[str]:
    """The lines that QEMU and adopt.so have written, without QEMU's warnings."""
    return [line for line in stderr.decode(errors="replace").splitlines() if "warning:" not in line]


def fails_to_start(
    emulator: Path | str, arguments: Sequence[str], environment: Mapping[str, str], keep: Sequence[int] = ()
) -> tuple[int, list[str]]:
    """Start a QEMU that is expected to exit: the exit status, and the :func:`log_lines`."""
    done = subprocess.run(
        [emulator, *arguments],
        env=environment,
        pass_fds=keep,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=TIMEOUT,
        check=False,
    )
    return done.returncode, log_lines(done.stderr)


def refused(
    emulator: Path | str, arguments: Sequence[str], keeper: Keeper, more: str = "", keep: Sequence[int] = ()
) -> str:
    """Start a destination that is expected to refuse: its one line, without the name in front."""
    environment = preloaded(f"fd:{keeper.theirs.fileno()}", more=more)
    status, lines = fails_to_start(emulator, arguments, environment, [keeper.theirs.fileno(), *keep])
    assert status == 1, lines
    assert len(lines) == 1, lines
    assert lines[0].startswith("sevhop adopt: "), lines
    return lines[0].removeprefix("sevhop adopt: ")


def build(source: str | Path, target: Path) -> Path:
    """Compile a library for a test: a file, or C code."""
    code = source.read_text() if isinstance(source, Path) else source
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", "-o", target, "-x", "c", "-"],
        input=code.encode(),
        check=True,
    )
    return target


#: Of the contexts.
POLICY = {"sev": 1, "sev-es": 5}


def sev_guest(c_bit: int, context: str = "sev", more: str = "") -> list[str]:
    """The options of an SEV guest."""
    sev = f"sev-guest,id=sev0,cbitpos={c_bit},reduced-phys-bits=1,policy={POLICY[context]}{more}"
    return ["-object", sev, "-machine", "confidential-guest-support=sev0"]
