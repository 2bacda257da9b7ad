"""A keeper in the event loop of one command: it serves the one destination that this command has started."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import resource
import socket
from typing import Self

from sevhop_qmp import selinux
from sevhop_qmp.process import QemuProcess
from sevhop_qmp.run_mark import RunMark

from ..guest.inspection import SevContext
from .handover import HandoverProtocol, SourceHandles

log = logging.getLogger(__name__)

#: Lowest number of descriptors that are above all others of a command; where fewer may be open, so far below the limit.
_LAST = 512
_MARGIN = 16


class LocalKeeper(HandoverProtocol):
    """
    Serves one destination, in the event loop in which it is entered.

    The other end of the socket pair is inherited by the destination alone.

    :ivar runs: set when the destination, which has received all of the guest, lets it run.
    """

    def __init__(
        self,
        handles: SourceHandles,
        context: SevContext,
        run_mark: RunMark | None = None,
        source: QemuProcess | None = None,
        *,
        stops_at_reboot: bool = False,
    ) -> None:
        super().__init__(handles, context, run_mark, source=source, stops_at_reboot=stops_at_reboot)
        with selinux.sharing_sockets():
            ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # A process that is killed closes its last descriptor first (the kernel's list of delayed closes is last in,
        # first out). So the destination finds this socket closed before it takes the end of its stream for a complete
        # one.
        with ours:
            last = min(_LAST, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _MARGIN)
            self._ours = socket.socket(fileno=fcntl.fcntl(ours, fcntl.F_DUPFD_CLOEXEC, last))
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

    def revoke_start(self) -> bool:
        """
        Prevent the guest from running in the destination. The kernel orders this and the destination's message ``run``:
        one comes first.

        :return: whether it is too late for that.
        """
        with contextlib.suppress(OSError):  # the destination has hung up
            self._ours.shutdown(socket.SHUT_RD)
        while self._serve():
            pass
        return self.runs.is_set()

    def _serve(self) -> bool:
        """Receive one message. :return: False when there is none, or there will be no more."""
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
        # The buffer has room for the one reply that is awaited; a destination that does not wait has exited.

        with contextlib.suppress(OSError):
            socket.send_fds(self._ours, [text.encode()], [] if fd is None else [fd])
        return True
