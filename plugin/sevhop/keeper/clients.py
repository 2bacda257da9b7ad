"""
The clients of a keeper's sockets, and whether a command is among them.

Each client is served by a task of its own. Who it is comes from the kernel (SO_PEERCRED), never from the client.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable

from sevhop_qmp.errors import SevhopError
from sevhop_qmp.peer import peer_credentials
from sevhop_qmp.process import QemuProcess

from .config import MESSAGE
from .tasks import Tasks

log = logging.getLogger(__name__)

#: Connections to one socket at a time. Two are needed; a client with more tries to exhaust our descriptors.
_CONNECTIONS = 32

#: Makes the reply to a request, and the descriptor that goes with it; never raises.
Answer = Callable[[socket.socket, bytes], Awaitable[tuple[str, int | None]]]
#: The reply to a command's request, by its name and argument; and to the hook, by operation, step, UUID and its pid.
OnCommand = Callable[[str, str], Awaitable[str]]
OnHook = Callable[[str, str, str, int], Awaitable[str]]


class Clients:
    """
    Serves clients, and notices when the last command has gone.

    :param command: pid of the command that starts the keeper. Until it has connected, it counts as connected while its
        process is alive.
    :param command_gone: called when no command is connected any more.
    """

    def __init__(self, command: int, command_gone: Callable[[], None]) -> None:
        self._process = QemuProcess.open(command)
        self._command_gone = command_gone
        self._expected = True
        self._commands: set[socket.socket] = set()
        self._tasks = Tasks()

    @property
    def has_command(self) -> bool:
        """Whether a command is connected, or is expected to connect."""
        return bool(self._commands) or self._expected

    def add_command(self, sock: socket.socket) -> None:
        """This client is a command."""
        self._commands.add(sock)
        if peer_credentials(sock)[0] == self._process.pid:
            self._expected = False

    async def answer(self, sock: socket.socket, request: bytes, command: OnCommand, hook: OnHook) -> str:
        """A request and its arguments, of a command or of the hook; never raises."""
        try:
            match request.decode().split(" "):
                case ["hook", operation, sub, uuid]:
                    return await hook(operation, sub, uuid, peer_credentials(sock)[0])
                case [name, *arguments]:
                    self.add_command(sock)
                    return await command(name, " ".join(arguments))
        except UnicodeDecodeError:
            pass
        except SevhopError as err:
            return f"error {err}"
        except Exception as err:
            log.exception("%r", request)
            return f"error unexpected {type(err).__name__}: {err}"
        return "error invalid request"

    async def listen(self, listener: socket.socket, uid: int, answer: Answer) -> None:
        """Serve all clients of a socket that run as a user, or as root."""
        loop = asyncio.get_running_loop()
        connected: set[asyncio.Task[None]] = set()
        while True:
            sock, _ = await loop.sock_accept(listener)
            if peer_credentials(sock)[1] not in (0, os.geteuid(), uid) or len(connected) >= _CONNECTIONS:
                sock.close()
                continue
            task = self._tasks.start(self._until_hangup(sock, answer))
            connected.add(task)
            task.add_done_callback(connected.discard)

    async def accept(self, listener: socket.socket, uid: int, accepted: Callable[[socket.socket], None]) -> None:
        """Hand over all clients of a socket that run as a user, or as root."""
        while True:
            sock, _ = await asyncio.get_running_loop().sock_accept(listener)
            if peer_credentials(sock)[1] in (0, os.geteuid(), uid):
                accepted(sock)
            else:
                sock.close()

    async def _until_hangup(self, sock: socket.socket, answer: Answer) -> None:
        loop = asyncio.get_running_loop()
        with sock, contextlib.suppress(OSError):
            sock.setblocking(False)
            while request := await loop.sock_recv(sock, MESSAGE):
                text, fd = await answer(sock, request)
                log.info("%r -> %s", request, text)
                socket.send_fds(sock, [_message(text)], [] if fd is None else [fd])
        if sock in self._commands:
            self._commands.discard(sock)
            if not self.has_command:
                self._command_gone()

    async def watch_command(self) -> None:
        """Wait until the process of the command that has started the keeper has exited."""
        await self._process.wait(float("inf"))
        expected, self._expected = self._expected, False
        if expected and not self._commands:
            self._command_gone()


def _message(text: str) -> bytes:
    """The reply as it is sent: truncated to the maximum, but not inside a character."""
    return text.encode(errors="backslashreplace")[:MESSAGE].decode(errors="ignore").encode()
