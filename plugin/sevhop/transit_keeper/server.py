"""
What a keeper answers whose guest runs in the transit: to the command, to libvirt's hook, and to destinations.

Any client's restore of the image has the guest hop into what libvirt starts (:mod:`sevhop.transit_keeper.restores`).
The states are in :mod:`sevhop.keeper.transit_state`. If the guest is switched off in the transit, the keeper ends that,
and has libvirt start the domain again if its XML asks for it (:mod:`sevhop.transit_keeper.watch`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shutil
import socket
from collections.abc import Coroutine
from typing import Any

from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import QemuProcess

from ..engine.transit import remove_confinement
from ..guest import saved_settings
from ..keeper.clients import Clients
from ..keeper.config import KeeperConfig
from ..keeper.fdstore import FdStore
from ..keeper.handover import SourceHandles
from ..keeper.paths import KeeperPaths
from ..keeper.state import HookAction
from ..keeper.tasks import Tasks
from ..keeper.transit_state import FINISHED, TransitState, at_hook, reason_against_request
from ..process import host_shutdown
from .ledger import Ledger, TransitRecord
from .restores import Restores
from .watch import End, TransitWatch

log = logging.getLogger(__name__)

#: Characters of the longest reason or note in a message, so that it fits however it is encoded.
_TEXT = 300


class TransitServer:
    """
    What the keeper has and what it does with it. Made once, before the first keeper is forked; each keeper begins with
    :meth:`restore`.

    :ivar clients: who is connected.
    :ivar end: set when nobody needs the keeper any more.
    """

    def __init__(self, config: KeeperConfig, paths: KeeperPaths, handles: SourceHandles) -> None:
        assert config.transit is not None
        if config.transit.settings:
            saved_settings.write(paths.directory, config.transit.settings)
        self._config = config
        self._transit = config.transit
        self._paths = paths
        self._process = QemuProcess.open(config.pid)
        self._watch = TransitWatch(config.transit, config.pid, config.step_timeout)
        self._ledger = Ledger(config.emulator)
        self._restores = Restores(config, paths, handles, self._ledger, self._watch, self._restored, self._end)
        self._tasks = Tasks()
        self._host_stops = False
        self.clients = Clients(config.command, self._command_gone)
        self.end = asyncio.Event()

    @property
    def record(self) -> TransitRecord:
        """What has happened so far."""
        return self._ledger.record

    def restore(self, fd_store: FdStore) -> None:
        """Begin, where the last keeper was."""
        attempt = self._ledger.restore(fd_store)
        if self.record.released or self.record.state in FINISHED:
            self.end.set()
            return
        self._tasks.start(self.clients.watch_command())
        self._tasks.start(self._watch_transit())
        if attempt is None:
            self._ledger.checkpoint()
        else:
            self._restores.continue_attempt(attempt, dict(fd_store.descriptors))

    def terminate(self) -> None:
        """On SIGTERM. Whoever ends a keeper ends no guest, unless that is systemd and the host shuts down."""
        self._command_gone()
        if not self._host_stops:
            self._host_stops = True  # the supervisor passes on its own SIGTERM: one is enough
            self._tasks.start(self._stop_with_host())

    async def _stop_with_host(self) -> None:
        """libvirt-guests does not know of the guest: have it shut down, and do not start it again."""
        if not await asyncio.to_thread(host_shutdown.in_progress):
            self._host_stops = False
            return
        with contextlib.suppress(SevhopError):
            monitor = await self._watch.connected()
            if (await monitor.execute("query-status"))["running"]:
                await monitor.execute("system_powerdown")
                return
        self.end.set()  # it cannot shut down: nobody is to wait for that

    def _command_gone(self) -> None:
        if self.record.state in FINISHED:
            self.end.set()

    async def _finish(self, state: TransitState) -> None:
        shutil.rmtree(self._transit.directory, ignore_errors=True)
        await remove_confinement(self._transit.cgroups, self._transit.apparmor_profile)
        self._ledger.enter(state)
        if not self.clients.has_command:
            self.end.set()

    async def _restored(self) -> None:
        """The guest is libvirt's again."""
        await self._finish(TransitState.OVER)

    # -- requests ------------------------------------------------------------------------------------

    def destinations(self, listener: socket.socket) -> Coroutine[Any, Any, None]:
        """Serve adopt.so at a socket."""
        return self.clients.accept(listener, self._config.uid, self._accept_destination)

    def _accept_destination(self, sock: socket.socket) -> None:
        """A process with adopt.so has connected: only while libvirt restores the domain is there a destination."""
        attempt = self._ledger.attempt
        if attempt is None or self.record.state is not TransitState.RESTORING:
            with sock, contextlib.suppress(OSError):
                sock.send(b"error the hook of sevhop did not announce this QEMU")
            return
        attempt.port.accept(sock)

    async def answer_control(self, sock: socket.socket, request: bytes) -> tuple[str, int | None]:
        """A request and its arguments; never raises."""
        return await self.clients.answer(sock, request, self._command, self._hook), None

    async def answer_hook(self, sock: socket.socket, request: str) -> str:
        """The same for a hook whose call was forwarded."""
        return (await self.answer_control(sock, request.encode()))[0]

    async def _command(self, request: str, argument: str) -> str:
        match request:
            case "status":
                return f"ok {json.dumps(self.status())}"
            case "emulator" if argument:
                self.record.emulator = argument
                self._ledger.checkpoint()
                return "ok"
            case "revoke" if self.record.state not in FINISHED:
                # Whoever asks for this ends the destination, too, and that is no client's will.
                await self._restores.end(by_us=True)
                if self.record.state is TransitState.TRANSIT:
                    return "ok"
            case "release" if self.record.state in FINISHED:
                self.record.released = True
                self._ledger.checkpoint()
                # Not before the reply, which is sent without a pause in this task, is on its way.
                asyncio.get_running_loop().call_soon(self.end.set)
                return "ok"
        return f"error {reason_against_request(self.record.state, request)}"

    def status(self) -> dict[str, object]:
        """What is reported to the command."""
        record = self.record
        return {
            "state": record.state.value,
            "name": self._config.name,
            "uuid": self._config.uuid,
            "image": str(self._paths.image),
            "emulator": record.emulator,
            "destination": record.destination,
            "version": record.version,
            "transit": self._config.pid,
            "transit_version": self._watch.version,
            "downtime_ms": record.downtime_ms,
            "move": record.move,
            "reason": record.reason[:_TEXT],
            "note": record.note[:_TEXT],
        }

    async def _hook(self, operation: str, sub: str, uuid: str, pid: int) -> str:
        action, reason = at_hook(
            self.record.state,
            operation,
            sub,
            own=uuid.lower() == self._config.uuid.lower(),
            restoring=self._restores.in_progress,
            connected=self._restores.connected,
            uuid=self._config.uuid,
            image=self._paths.image,
        )
        match action:
            case HookAction.REFUSE:
                return f"error {reason}"
            case HookAction.IGNORE:
                return "foreign"
            case HookAction.BEGIN_RESTORE:
                return await self._restores.begin(pid)
        return "ok"

    # -- the guest in the transit --------------------------------------------------------------------

    async def _watch_transit(self) -> None:
        end = await self._watch.until_ended()
        await self._restores.end_for_good()
        if not self._restores.arrived and self.record.state not in FINISHED:
            await self._end(end)

    async def _end(self, end: End) -> None:
        """The guest is off: end the transit, and do what the domain's XML asks for."""
        self._process.kill()
        await self._process.wait(self._config.step_timeout)
        self.record.reason = end.reason
        self._ledger.enter(TransitState.ENDED)
        if end.restarts and not self._host_stops:
            self.record.note = await self._watch.start_domain(self._config)
        await self._finish(TransitState.ENDED)
