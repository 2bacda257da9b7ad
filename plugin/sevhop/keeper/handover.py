"""
What the keeper hands over from one QEMU to the next: the guest's memory, its VM, its listening sockets.

The library in the destination (adopt.so) requests it over a connected SOCK_SEQPACKET socket, one ASCII message per
request and reply:

======================  =====================================================================================
``hello 1``             ``ok context=... source=... handle=... measurement=... reboot=shutdown``, or ``error REASON``
``memfd N NAME``        ``fd SIZE`` with the N-th memfd of that name, counted from 0; or ``none``
``listener HEX``        ``fd`` with the source's socket that listens at this ``struct sockaddr``; or ``none``
``run-mark``            ``fd`` with the run mark, which is written before the guest runs there; or ``none``
``source``              ``fd`` with a pidfd of the source, which is ignored once it has exited; or ``none``
``run``                 no reply: from here on the guest runs there
======================  =====================================================================================

:class:`HandoverProtocol` makes the replies. They are sent by :mod:`sevhop.keeper.local` while one command runs, and by
:mod:`sevhop.keeper.server` while libvirt terminates one QEMU and starts the next.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self

from sevhop_qmp import stream_sockets
from sevhop_qmp.errors import RamError
from sevhop_qmp.process import QemuProcess
from sevhop_qmp.ram_block_table import UNKNOWN_HINT
from sevhop_qmp.ram_blocks import RamBlock
from sevhop_qmp.run_mark import RunMark
from sevhop_qmp.stream_sockets import Address

from ..guest import command_line
from ..guest.inspection import Guest, SevContext

PROTOCOL = 1
_MEMFD_LINK = re.compile(r"/memfd:(?P<name>.*) \(deleted\)$")
#: The name that QEMU gives to the memfd of every memory-backend-memfd object.
_BACKEND_MEMFD = "memory-backend-memfd"
_MEMORY_HINT = "start the guest with its memory in a memory-backend-memfd object with share=on"


@dataclass(frozen=True)
class SourceHandles:
    """
    Duplicates of a source's descriptors.

    :ivar source_vm_fd: descriptor of its KVM VM; None under TCG.
    :ivar memfds: name → descriptors in the order in which QEMU asks for them.
    :ivar listeners: address → descriptor.
    """

    source_vm_fd: int | None
    memfds: dict[str, list[int]]
    listeners: dict[Address, int] = field(default_factory=dict)

    @classmethod
    def take(cls, process: QemuProcess, guest: Guest) -> Self:
        """
        Duplicate everything from the source. Nothing of the source changes.

        :raises ProcessError: it has exited, or access is denied.
        :raises RamError: the memfd of a backend cannot be identified.
        """
        handles = cls.take_machine(process, guest.blocks.values())
        try:
            handles.listeners.update(stream_sockets.listeners(process))
        except BaseException:
            handles.close()
            raise
        return handles

    @classmethod
    def take_machine(cls, process: QemuProcess, blocks: Iterable[RamBlock]) -> Self:
        """
        The same without the sockets: a source that exits first leaves its addresses to the destination.

        :param blocks: the source's RAM blocks.
        """
        number = process.vm_descriptor()
        handles = cls(None if number is None else process.duplicate(number), {})
        try:
            handles._take_memory(process, blocks)
        except BaseException:
            handles.close()
            raise
        return handles

    def _take_memory(self, process: QemuProcess, blocks: Iterable[RamBlock]) -> None:
        # All backends' memfds have the same name in /proc. A memfd is guest memory if its inode is mapped as a RAM
        # block.
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
                # A backend that the guest does not use has no block, but the destination requests it all the same.
                if inode in seen or (block is None and link["name"] != _BACKEND_MEMFD):
                    os.close(fd)
                    continue
                seen.add(inode)
                # Descriptors are in the order of creation, unless one was free again when memory was plugged in.
                later = link["name"] == _BACKEND_MEMFD and block is not None and block.backend not in from_start
                (plugged if later else self.memfds.setdefault(link["name"], [])).append(fd)
                if block is not None and block.size != stat.st_size:
                    sizes = f"QEMU reports {block.size} bytes, but its memfd has {stat.st_size}"
                    raise RamError(f"cannot hand over RAM block {block.name}: {sizes}", UNKNOWN_HINT)
        finally:
            if plugged:
                self.memfds.setdefault(_BACKEND_MEMFD, []).extend(plugged)
        if by_inode:
            names = ", ".join(sorted(block.name for block in by_inode.values()))
            raise RamError(
                f"cannot hand over the memory of {names}: the old QEMU has no descriptor of it", _MEMORY_HINT
            )

    def close(self) -> None:
        """Close all descriptors."""
        fds = [fd for group in self.memfds.values() for fd in group] + list(self.listeners.values())
        if self.source_vm_fd is not None:
            fds.append(self.source_vm_fd)
        for fd in fds:
            os.close(fd)


class HandoverProtocol:
    """
    The replies to a destination.

    :param run_mark: that it writes before the guest runs there; None for a rehearsal, in which nothing runs.
    :param source: the process that the destination ignores once it has exited; None for a rehearsal.
    :param source_ended: the source has exited already, so the destination maps the guest's pages at once.
    :param stops_at_reboot: the guest cannot be reset there (:mod:`sevhop.guest.reboot`): its reboot stays a shutdown,
        whatever a client sets.
    """

    def __init__(
        self,
        handles: SourceHandles,
        context: SevContext,
        run_mark: RunMark | None = None,
        *,
        source: QemuProcess | None = None,
        source_ended: bool = False,
        stops_at_reboot: bool = False,
    ) -> None:
        self._handles = handles
        self._context = context
        self._run_mark = run_mark
        self._source_process = source
        self._source = "ended" if source_ended else "running"
        self._stops_at_reboot = stops_at_reboot

    def answer(self, request: bytes) -> tuple[str, int | None]:
        """The reply to a request, and the descriptor that goes with it."""
        try:
            match request.decode("ascii").rstrip("\n").split(" ", 2):
                case ["hello", version]:
                    return self._hello(int(version)), None
                case ["memfd", number, name] if number.isdigit():
                    fd = self._handles.memfds.get(name, [])[int(number)]
                    return f"fd {os.fstat(fd).st_size}", fd
                case ["listener", hexadecimal]:
                    address = stream_sockets.address_from_sockaddr(bytes.fromhex(hexadecimal))
                    fd_or_none = self._handles.listeners.get(address) if address else None
                    return ("none", None) if fd_or_none is None else ("fd", fd_or_none)
                case ["run-mark"]:
                    return ("none", None) if self._run_mark is None else ("fd", self._run_mark.fileno())
                case ["source"]:
                    process = self._source_process
                    return ("none", None) if process is None else ("fd", process.fileno())
        except IndexError:
            return "none", None
        except ValueError:
            pass
        return "error invalid request", None

    def _hello(self, version: int) -> str:
        if version != PROTOCOL:
            return f"error protocol version {version} is not supported, only {PROTOCOL}"

        answer = f"ok context={self._context.kind} source={self._source}"
        if self._context.kind != "none":
            answer += f" handle={self._context.handle}"
            if self._context.measurement:
                answer += f" measurement={self._context.measurement}"
        if self._stops_at_reboot:
            answer += " reboot=shutdown"
        return answer
