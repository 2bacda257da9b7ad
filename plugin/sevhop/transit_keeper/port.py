"""
The connection of adopt.so in a destination to which the guest hops from the transit.

adopt.so connects when libvirt starts that QEMU, and stays connected until the hop is over. Besides the requests of
:mod:`sevhop.keeper.handover` it sends

==========  ============================================================================================
``stream``  ``fd DEVICE INODE`` with a pipe, which takes the place of the save image of these numbers
``run``     no reply: from here on the guest runs there
==========  ============================================================================================

A keeper that refuses the start shuts its side down for reading before the message comes. The kernel orders the two: one
comes first.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path

from sevhop_qmp.peer import peer_credentials

from ..keeper.config import MESSAGE
from ..keeper.handover import HandoverProtocol

log = logging.getLogger(__name__)

#: Lowest number of descriptors that are above all others of a keeper; see :class:`sevhop.keeper.local.LocalKeeper`.
_LAST = 512
#: Connections of processes that have not asked for anything. A client with more tries to exhaust our descriptors.
_CONNECTIONS = 32


class DestinationPort:
    """
    Serves the destination of one restore: the first process that asks for anything.

    :param protocol: for its requests.
    :param reader: end of the pipe for the stream.
    :param image: the save image.
    :param connected: called when the process is known.
    :ivar peer: its pid; 0 before.
    :ivar runs: set when the destination, which has received all of the guest, lets it run.
    """

    def __init__(self, protocol: HandoverProtocol, reader: int, image: Path, connected: Callable[[], None]) -> None:
        self._protocol = protocol
        self._reader = reader
        self._image = image
        self._connected = connected
        self._clients: set[socket.socket] = set()
        self._socket: socket.socket | None = None
        self.peer = 0
        self.runs = asyncio.Event()

    @property
    def descriptor(self) -> int | None:
        """The connection, for a checkpoint."""
        return None if self._socket is None else self._socket.fileno()

    def restore(self, descriptor: int) -> None:
        """Have the connection of a keeper that has exited."""
        self._take(socket.socket(fileno=descriptor))

    def accept(self, sock: socket.socket) -> None:
        """A process has connected."""
        if len(self._clients) >= _CONNECTIONS:
            sock.close()
            return
        sock.setblocking(False)
        self._clients.add(sock)
        asyncio.get_running_loop().add_reader(sock, self._first, sock)

    def close(self) -> None:
        """Disconnect. A destination that has not run the guest cannot any more."""
        if self._socket is not None:
            self._hang_up(self._socket)
            self._socket = None
        while self._clients:
            self._hang_up(self._clients.pop())

    def revoke_start(self) -> bool:
        """
        Prevent the guest from running in the destination.

        :return: whether it is too late for that.
        """
        if self._socket is not None:
            with contextlib.suppress(OSError):  # the destination has hung up
                self._socket.shutdown(socket.SHUT_RD)
            while self._serve():
                pass
        return self.runs.is_set()

    def _first(self, sock: socket.socket) -> None:
        """The first message of a process, or its end: some only print their version."""
        try:
            waiting = sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            waiting = b""
        asyncio.get_running_loop().remove_reader(sock)
        self._clients.discard(sock)
        pid = peer_credentials(sock)[0]
        if not waiting or self.peer not in (0, pid):
            if waiting:
                with contextlib.suppress(OSError):
                    sock.send(f"error process {self.peer} is the new QEMU of this guest".encode())
            sock.close()
            return
        with sock:
            self._take(socket.socket(fileno=fcntl.fcntl(sock, fcntl.F_DUPFD_CLOEXEC, _LAST)))
        self._connected()
        self._serve()

    def _take(self, sock: socket.socket) -> None:
        if self._socket is not None:
            self._hang_up(self._socket)
        sock.setblocking(False)
        self._socket, self.peer = sock, peer_credentials(sock)[0]
        asyncio.get_running_loop().add_reader(sock, self._serve)

    def _hang_up(self, sock: socket.socket) -> None:
        asyncio.get_running_loop().remove_reader(sock)
        sock.close()

    def _serve(self) -> bool:
        """Receive one message. :return: False when there is none, or there will be no more."""
        sock = self._socket
        if sock is None:
            return False
        try:
            request = sock.recv(MESSAGE)
        except BlockingIOError:
            return False
        except OSError:
            request = b""
        if not request:
            asyncio.get_running_loop().remove_reader(sock)
            return False
        if request == b"run":
            self.runs.set()
            return True
        text, fd = self._stream() if request == b"stream" else self._protocol.answer(request)
        log.debug("%r -> %s", request, text)
        with contextlib.suppress(OSError):
            socket.send_fds(sock, [text.encode()], [] if fd is None else [fd])
        return True

    def _stream(self) -> tuple[str, int | None]:
        try:
            image = os.stat(self._image)
        except OSError as err:
            return f"error the save image is gone: {err.strerror}", None
        return f"fd {image.st_dev} {image.st_ino}", self._reader
