"""
The keeper holds what must outlive one QEMU and reach the next: the guest's memory, its VM, its listening sockets.

The library in the destination (adopt.so) asks it over a connected SOCK_SEQPACKET socket, one ASCII message per
request and reply:

======================  =====================================================================================
``hello 1``             ``ok context=... source=... handle=... measurement=...``, or ``no REASON``
``memfd N NAME``        ``fd SIZE`` with the N-th memfd of that name, counted from 0; or ``none``
``listener HEX``        ``fd`` with the source's socket that listens at this ``struct sockaddr``; or ``none``
``run-mark``            ``fd`` with the mark that is left before the guest runs there; or ``none``
``source``              ``fd`` with a pidfd of the source, which matters no more once it has ended; or ``none``
``run``                 none: from here on the guest runs there
======================  =====================================================================================

:class:`Answers` is what it says; :class:`Keeper` says it for as long as one command runs, and
:mod:`sevhop.keeper.server` for as long as libvirt needs to end one QEMU and start the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self

from sevhop_qmp.errors import RamError
from sevhop_qmp.process import Address, QemuProcess, address_from_sockaddr
from sevhop_qmp.ram_blocks import RamBlock
from sevhop_qmp.run_mark import RunMark

from ..guest import command_line
from ..guest.inspection import Guest, SevContext

log = logging.getLogger(__name__)

PROTOCOL = 1
#: Where descriptors begin that are above all others of a command.
_LAST = 512
_MEMFD_LINK = re.compile(r"/memfd:(?P<name>.*) \(deleted\)$")
#: The name that QEMU gives to the memfd of every memory-backend-memfd object.
_BACKEND_MEMFD = "memory-backend-memfd"


@dataclass(frozen=True)
class Held:
    """
    What is held of a source.

    :ivar vm: descriptor of its KVM VM; None under TCG.
    :ivar memfds: name → descriptors in the order in which QEMU asks for them.
    :ivar listeners: address → descriptor.
    """

    vm: int | None
    memfds: dict[str, list[int]]
    listeners: dict[Address, int] = field(default_factory=dict)

    @classmethod
    def take(cls, process: QemuProcess, guest: Guest) -> Self:
        """
        Duplicate everything from the source. Nothing of the source changes.

        :raises ProcessError: it has ended, or we may not.
        :raises RamError: the memory behind a backend cannot be told for certain.
        """
        held = cls.take_machine(process, guest.blocks.values())
        try:
            held.listeners.update(process.listeners())
        except BaseException:
            held.close()
            raise
        return held

    @classmethod
    def take_machine(cls, process: QemuProcess, blocks: Iterable[RamBlock]) -> Self:
        """
        The same without the sockets: a source that ends first leaves its addresses to the destination.

        :param blocks: the source's RAM blocks.
        """
        number = process.vm_descriptor()
        held = cls(None if number is None else process.duplicate(number), {})
        try:
            held._take_memory(process, blocks)
        except BaseException:
            held.close()
            raise
        return held

    def _take_memory(self, process: QemuProcess, blocks: Iterable[RamBlock]) -> None:
        # /proc tells names, and all backends have the same one. That a memfd is guest memory is proven by its inode,
        # which is mapped as a RAM block.
        by_inode = {block.inode: block for block in blocks if block.shared}
        from_start = command_line.memory_backends(process.command_line[1:])
        plugged: list[int] = []
        try:
            seen = set()
            for descriptor in process.descriptors():
                link = _MEMFD_LINK.match(descriptor.target)
                if link is None:
                    continue
                fd = process.duplicate(descriptor.number)
                stat = os.fstat(fd)
                inode = (f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}", stat.st_ino)
                block = by_inode.pop(inode, None)
                # A backend that the guest does not use has no block, but the destination will ask for it all the same.
                if inode in seen or (block is None and link["name"] != _BACKEND_MEMFD):
                    os.close(fd)
                    continue
                seen.add(inode)
                # Descriptors are in the order of creation, unless one was free again when memory was plugged in.
                later = link["name"] == _BACKEND_MEMFD and block is not None and block.backend not in from_start
                (plugged if later else self.memfds.setdefault(link["name"], [])).append(fd)
                if block is not None and block.size != stat.st_size:
                    told = f"RAM block {block.name} has {block.size} bytes"
                    raise RamError(f"QEMU says that {told}, but its memfd has {stat.st_size}")
        finally:
            if plugged:
                self.memfds.setdefault(_BACKEND_MEMFD, []).extend(plugged)
        if by_inode:
            names = ", ".join(sorted(block.name for block in by_inode.values()))
            raise RamError(f"no descriptor of the source leads to the memory of {names}")

    def close(self) -> None:
        """Let go of everything."""
        fds = [fd for group in self.memfds.values() for fd in group] + list(self.listeners.values())
        if self.vm is not None:
            fds.append(self.vm)
        for fd in fds:
            os.close(fd)


class Answers:
    """
    What a destination is told.

    :param run_mark: that it leaves a mark in before the guest runs there; None for a trial, in which nothing runs.
    :param source_ended: the source is gone already, so the destination maps the guest's pages by itself.
    """

    def __init__(
        self, held: Held, context: SevContext, run_mark: RunMark | None = None, *, source_ended: bool = False
    ) -> None:
        self._held = held
        self._context = context
        self._run_mark = run_mark
        self._source = "ended" if source_ended else "running"
        self._pidfd: int | None = None

    def answer(self, request: bytes) -> tuple[str, int | None]:
        """The reply to a request, and the descriptor that goes with it."""
        try:
            words = request.decode("ascii").rstrip("\n").split(" ", 2)
            match words:
                case ["hello", version]:
                    return self._hello(int(version)), None
                case ["memfd", number, name] if number.isdigit():
                    fd = self._held.memfds.get(name, [])[int(number)]
                    return f"fd {os.fstat(fd).st_size}", fd
                case ["listener", hexadecimal]:
                    address = address_from_sockaddr(bytes.fromhex(hexadecimal))
                    fd_or_none = self._held.listeners.get(address) if address else None
                    return ("none", None) if fd_or_none is None else ("fd", fd_or_none)
                case ["run-mark"]:
                    return ("none", None) if self._run_mark is None else ("fd", self._run_mark.fileno())
                case ["source"]:
                    return ("none", None) if self._pidfd is None else ("fd", self._pidfd)
        except IndexError:
            return "none", None
        except ValueError:
            pass
        return "no this is not a request", None

    def _hello(self, version: int) -> str:
        if version != PROTOCOL:
            return f"no protocol {version} is not spoken here, only {PROTOCOL}"
        answer = f"ok context={self._context.kind} source={self._source}"
        if self._context.kind != "none":
            answer += f" handle={self._context.handle}"
            if self._context.measurement:
                answer += f" measurement={self._context.measurement}"
        return answer


class Keeper(Answers):
    """
    Answers one destination, in the event loop of who enters it.

    Who holds the other end of the socket pair may ask; it is inherited by the destination alone.

    :param source: the process that the destination need not respect once it has ended; None for a trial.
    :ivar runs: set when the destination, which had been given all of the guest, has let it run.
    """

    def __init__(
        self, held: Held, context: SevContext, run_mark: RunMark | None = None, source: QemuProcess | None = None
    ) -> None:
        super().__init__(held, context, run_mark)
        self._pidfd = None if source is None else source.fileno()
        ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # A process that is killed closes its last descriptor first (the kernel's list of delayed closes is one of last
        # in, first out). So the destination finds nobody here before it takes the end of its stream for the last of it.
        with ours:
            self._ours = socket.socket(fileno=fcntl.fcntl(ours, fcntl.F_DUPFD_CLOEXEC, _LAST))
        self._ours.setblocking(False)
        self._loop: asyncio.AbstractEventLoop
        self.runs = asyncio.Event()

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._ours, self._serve)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.remove_reader(self._ours)
        self.theirs.close()
        self._ours.close()

    def forbid(self) -> bool:
        """
        See to it that the guest does not run in the destination. The kernel decides between its message and this: one
        comes first.

        :return: whether it is too late for that.
        """
        with contextlib.suppress(OSError):  # it has hung up
            self._ours.shutdown(socket.SHUT_RD)
        while self._serve():
            pass
        return self.runs.is_set()

    def _serve(self) -> bool:
        """Take one message. :return: False when there is none, or will be none any more."""
        try:
            request = self._ours.recv(4096)
        except BlockingIOError:
            return False
        except OSError:
            request = b""
        if not request:
            self._loop.remove_reader(self._ours)
            return False
        if request == b"run":
            self.runs.set()
            return True
        text, fd = self.answer(request)
        log.debug("keeper: %r -> %s", request, text)
        # It has room for the one answer that is awaited; who does not wait has ended.
        with contextlib.suppress(OSError):
            socket.send_fds(self._ours, [text.encode()], [] if fd is None else [fd])
        return True
