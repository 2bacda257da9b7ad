"""
The keeper as a process of its own: it has the guest between the old QEMU, which is terminated, and the new one.

libvirt cannot have two domains of one UUID, so for a moment there is no QEMU at all. What is left of the guest then is
here (its memory, its VM, the RAM blocks that were private to the source) and in a save image (its device state). The
keeper has a session of its own and outlives the command that started it. This process becomes its supervisor
(:mod:`sevhop.keeper.supervisor`), and restarts it: in whatever state it is killed, its successor continues from the
last checkpoint. What it does with the guest is in :mod:`sevhop.keeper.server`.

In its directory, which it makes and removes, are three sockets, all SOCK_SEQPACKET; peers are checked by SO_PEERCRED:

``control``   root's: the command that has started it, and the hook where that is a program of its own
``hook``      root's: the hook; see :mod:`sevhop.libvirt.hook_server`
``keeper``    QEMU's user's: adopt.so in the destination, which must be the first process that connected since the
              restore began; see :mod:`sevhop.keeper.handover`
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import QemuProcess

from ..libvirt import hook, hook_server
from ..process import shutdown_inhibitor
from ..records.run_directory import claim, listening, remove
from .clients import Clients
from .config import KeeperConfig
from .fdstore import FdStore
from .handover import SourceHandles
from .paths import KeeperPaths
from .server import KeeperServer
from .supervisor import Supervisor, protect, rename


class Server(Protocol):
    """
    What a keeper has and what it does with it. Made once, before the first keeper is forked; each keeper begins with
    ``restore``.

    :ivar clients: who is connected.
    :ivar end: set when nobody needs the keeper any more.
    """

    clients: Clients
    end: asyncio.Event

    def restore(self, fd_store: FdStore) -> None:
        """Begin, where the last keeper was."""

    def terminate(self) -> None:
        """On SIGTERM."""

    def destinations(self, listener: socket.socket) -> Coroutine[Any, Any, None]:
        """Serve adopt.so at a socket."""

    async def answer_control(self, sock: socket.socket, request: bytes) -> tuple[str, int | None]:
        """The reply to a command; never raises."""

    async def answer_hook(self, sock: socket.socket, request: str) -> str:
        """The reply to a hook; never raises."""


#: Makes what a keeper is: with its configuration, its paths, and what was taken from the QEMU that has the guest.
Make = Callable[[KeeperConfig, KeeperPaths, SourceHandles], Server]


def _keep(make: Make, config: KeeperConfig, paths: KeeperPaths) -> None:
    """Take everything from the source, report that, and supervise the keepers that have it."""
    source = QemuProcess.open(config.pid)
    handles = SourceHandles.take_machine(source, config.blocks)
    source.close()
    monitor = paths.monitor.parent
    monitor.mkdir(mode=0o700)
    os.chown(monitor, config.uid, config.gid)
    server = make(config, paths, handles)
    control = listening(paths.control, os.geteuid())
    calls = listening(paths.hook, os.geteuid())
    keeper = listening(paths.keeper, config.uid)

    async def serve(fd_store: FdStore) -> None:
        server.restore(fd_store)
        await _until_end(
            server,
            server.clients.listen(control, os.geteuid(), server.answer_control),
            server.destinations(keeper),
            hook_server.listen(calls, server.answer_hook),
        )
        # Whoever waits for our exit must not find anything left.
        remove(config.name, paths.directory)

    def work(fd_store: FdStore) -> int:
        rename("sevhop-keeper")
        asyncio.run(serve(fd_store))
        return 0

    print(f"ready {paths.directory}", flush=True)
    _detach()
    with shutdown_inhibitor.taken(f"the guest of {config.name} is between two QEMUs; see sevhop status"):
        Supervisor(work).run()


async def _until_end(server: Server, *listening: Coroutine[Any, Any, None]) -> None:
    """Serve until the keeper is not needed any more. One that cannot listen exits, and its successor tries again."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.terminate)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    tasks = {asyncio.ensure_future(work) for work in (server.end.wait(), *listening)}
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()


def _detach() -> None:
    """Close what was inherited from the command: it waits for the end of our output."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    os.close(null)


def _transit(config: KeeperConfig) -> str:
    """:raises ProcessError: it has exited."""
    if config.transit is None:
        return ""
    transit = QemuProcess.open(config.pid)
    try:
        return f"{transit.pid} {transit.start_time}"
    finally:
        transit.close()


def main(make: Make = KeeperServer) -> int:
    """The process, which becomes the supervisor. :param make: what the keeper is."""
    protect()
    rename("sevhop-supervisor")
    logging.basicConfig(level=logging.CRITICAL)
    try:
        config = KeeperConfig.from_json(sys.stdin.read())
        directory = claim(config.name, config.uuid, transit=_transit(config))
        try:
            _keep(make, config, KeeperPaths(directory))
        finally:
            # If nobody keeps a guest that runs in the transit, the hook still has to find that.
            if not hook.transit_of(str(directory)):
                remove(config.name, directory)
    except SevhopError as err:
        print(err, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
