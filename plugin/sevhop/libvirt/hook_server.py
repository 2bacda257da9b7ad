"""
libvirt's hook, run by the keeper itself.

libvirt runs the hook three times while the guest is stopped, and each time the start of a Python would take longer than
the reply. So for a domain in a hop libvirt's hook script starts a small program instead, ``host/hook_client``. It sends
libvirt's arguments and its own three streams; here :func:`sevhop.libvirt.hook.main` runs with them, and the exit status
is sent back. Without a keeper, ``hook.py`` runs as a program of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

from sevhop_qmp.peer import peer_credentials

from . import hook

log = logging.getLogger(__name__)

#: Name of the socket in the keeper's directory.
SOCKET = "hook"
#: Started by the hook script.
CLIENT = Path(__file__).resolve().parent.parent / "host" / "hook_client"
#: Seconds from the connection until the call must have arrived.
_CALL_TIMEOUT = 10.0
#: Bytes of the longest call.
_MESSAGE = 4096
_STREAMS = 3

#: Replies to a request of the hook; the socket is the one from which the call came.
Answer = Callable[[socket.socket, str], Awaitable[str]]


async def listen(listener: socket.socket, answer: Answer) -> None:
    """Serve calls at a socket until cancelled. Only root's are accepted: libvirt runs the hook as root."""
    loop = asyncio.get_running_loop()
    # The first thread takes some milliseconds, most of them for imports; not during the downtime.
    await asyncio.to_thread(os.getpid)
    calls: set[asyncio.Task[None]] = set()
    while True:
        sock, _ = await loop.sock_accept(listener)
        if peer_credentials(sock)[1] not in (0, os.geteuid()):
            sock.close()
            continue
        task = asyncio.ensure_future(asyncio.to_thread(_serve, sock, answer, loop))
        calls.add(task)
        task.add_done_callback(calls.discard)


def _serve(sock: socket.socket, answer: Answer, loop: asyncio.AbstractEventLoop) -> None:
    """One call, in a thread of its own: the streams are libvirt's pipes, and may block, as may the commit."""

    def ask(request: str) -> str:
        return asyncio.run_coroutine_threadsafe(_once(answer(sock, request)), loop).result(hook.PATIENCE)

    with contextlib.ExitStack() as open_files:
        open_files.enter_context(sock)
        try:
            sock.settimeout(_CALL_TIMEOUT)
            call, descriptors, _, _ = socket.recv_fds(sock, _MESSAGE, _STREAMS)
            for fd in descriptors:
                open_files.callback(os.close, fd)
            if len(descriptors) != _STREAMS:
                return
            arguments = call.decode(errors="surrogateescape").split("\0")
            first, second, third = descriptors
            with hook.stream(first, "r") as xml, hook.stream(second, "w") as out, hook.stream(third, "w") as err:
                status = hook.main(arguments, xml, out, err, keeper=ask)
            sock.send(bytes([status]))
        except OSError as error:
            log.info("cannot serve a hook call: %s", error)


async def _once(answer: Awaitable[str]) -> str:
    return await answer
