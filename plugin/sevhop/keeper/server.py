"""
What a keeper does with the guest that it has, on request of the command, the hook and the destination.

The states, and what is allowed in each, are in :mod:`sevhop.keeper.state`; sockets are in :mod:`sevhop.keeper.clients`.
Every request is idempotent: a client that lost its keeper without a reply repeats the request to the next one.

The commit happens here, requested by the hook at ``started begin``: the saved RAM blocks are written into the
destination and the SEV context is moved. Whether the guest has run there is in the run mark
(:mod:`sevhop_qmp.run_mark`), which the keeper shares. Only a guest that has not run there may be restored again:
otherwise what the keeper has is outdated.

The keeper also terminates the source (:mod:`sevhop.keeper.source`). It exits on request; when the guest runs and no
command is connected any more; and when the command goes away while the source still has everything. SIGTERM terminates
it unless the guest may exist nowhere else.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import Coroutine
from dataclasses import asdict
from typing import Any

from sevhop_qmp import adopt
from sevhop_qmp.errors import SevhopError
from sevhop_qmp.monitor import Monitor
from sevhop_qmp.move import MoveReport
from sevhop_qmp.peer import peer_credentials
from sevhop_qmp.process import QemuProcess
from sevhop_qmp.run_mark import RunMark, RunState

from . import destination
from .clients import Clients
from .config import KeeperConfig, KeeperError
from .context_vms import ContextVms
from .destination import ProbedDestination
from .domain_reboot import stop_at_reboot
from .fdstore import FdStore
from .handover import HandoverProtocol, SourceHandles
from .paths import KeeperPaths
from .record import KeeperRecord
from .restore import Restore, clear_monitor
from .saved_blocks import SavedBlocks
from .source import KILL_TIMEOUT, Source
from .state import (
    FINISHED,
    KEEPER_NEEDED,
    RAN,
    SOURCE_GONE,
    Attempt,
    Facts,
    HookAction,
    State,
    after_destination_exit,
    at_hook,
    exits_with_command,
    reason_against_request,
)
from .tasks import Tasks

log = logging.getLogger(__name__)

#: Seconds between two attempts to reconnect to a destination that has hung up but has not exited.
_REACH_POLL = 0.05
#: The longest part of the step timeout for one of the waits of a request, whose reply is waited for that long.
_PART_OF_STEP = 0.4
#: Characters of the longest reason or note in a message, so that it fits however it is encoded.
_TEXT = 300

#: The destination's pidfd in a checkpoint.
_DESTINATION = "destination"


class KeeperServer:
    """
    What the keeper has and what it does with it. Made once, before the first keeper is forked; each keeper begins with
    :meth:`restore`.

    :ivar record: what has happened so far.
    :ivar clients: who is connected.
    :ivar end: set when nobody needs the keeper any more.
    """

    def __init__(self, config: KeeperConfig, paths: KeeperPaths, handles: SourceHandles) -> None:
        self._config = config
        self._paths = paths
        self._handles = handles
        self._run_mark = RunMark.create()
        self._source = Source(config)
        self._saved_blocks = SavedBlocks(config)
        self._context_vms = ContextVms(handles.source_vm_fd, self._checkpoint)
        self._restore = Restore()
        self._destination: QemuProcess | None = None
        self._fd_store = FdStore({}, {})
        self._tasks = Tasks()
        self._retiring = asyncio.Lock()
        self._committing = asyncio.Lock()
        self.record = KeeperRecord(config.emulator)
        self.clients = Clients(config.command, self._command_gone)
        self.end = asyncio.Event()

    # -- what outlives the keeper --------------------------------------------------------------------

    def restore(self, fd_store: FdStore) -> None:
        """
        Begin, where the last keeper was.

        :raises RamError: the RAM blocks that it had saved cannot be read.
        """
        self._fd_store = fd_store
        stored, descriptors = fd_store.record, dict(fd_store.descriptors)
        if stored:
            self.record = KeeperRecord.from_fields(stored["record"])
            self._context_vms.report = MoveReport(**stored["move"]) if stored["move"] else None
            if stored["destination"]:
                self._destination = QemuProcess(stored["destination"], descriptors.pop(_DESTINATION))
            self._saved_blocks.restore(descriptors)
            self._context_vms.restore(stored["vms"], descriptors)
        if self.record.released:
            self.end.set()
        self._tasks.start(self.clients.watch_command())
        if self.record.state is State.RETIRING:
            self._tasks.start(self._finish_retiring())
        elif self.record.state is State.RESTORING:
            # libvirt may still be restoring. If a request of the hook was interrupted it was refused, and libvirt will
            # restore again.
            self._restore.expect(self._config, self._paths)
        elif self.record.state is State.COMMITTED and self._destination is not None:
            self._tasks.start(self._until_it_runs(self._destination, None))

    def _checkpoint(self) -> None:
        """Store the state: whatever comes next is done by this keeper or by its successor."""
        descriptors = self._context_vms.descriptors() | self._saved_blocks.descriptors()
        if self._destination is not None:
            descriptors[_DESTINATION] = self._destination.fileno()
        stored = {
            "record": self.record.as_fields(),
            "move": asdict(self._context_vms.report) if self._context_vms.report else None,
            "destination": self._destination.pid if self._destination else 0,
            "vms": self._context_vms.names,
        }
        needed = self.record.state in KEEPER_NEEDED and not self.record.released
        self._fd_store.store(stored, descriptors, needed=needed)

    def _enter(self, state: State) -> None:
        self.record.state = state
        self._checkpoint()

    # -- its end -------------------------------------------------------------------------------------

    def terminate(self) -> None:
        """On SIGTERM."""
        if self.record.state not in KEEPER_NEEDED:
            self.end.set()

    def _command_gone(self) -> None:
        if exits_with_command(self.record.state):
            self.end.set()

    def _finish(self, state: State) -> None:
        self._enter(state)
        if not self.clients.has_command:
            self.end.set()

    # -- adopt.so ----------------------------------------------------------------------------------

    def destinations(self, listener: socket.socket) -> Coroutine[Any, Any, None]:
        """Serve adopt.so at a socket."""
        return self.clients.listen(listener, self._config.uid, self.answer_destination)

    async def answer_destination(self, sock: socket.socket, request: bytes) -> tuple[str, int | None]:
        """Answer adopt.so: only while libvirt restores the domain, with our hook, is there a destination."""
        if self.record.state is not State.RESTORING:
            return "error the hook of sevhop did not announce this QEMU", None
        pid = peer_credentials(sock)[0]
        if self.record.peer is None:
            self.record.peer = pid
            self._restore.started(pid)
            self._checkpoint()
        elif self.record.peer != pid:
            return f"error process {self.record.peer} is the new QEMU of this guest", None
        context, stops = self._config.context, self._config.stops_at_reboot
        protocol = HandoverProtocol(self._handles, context, self._run_mark, source_ended=True, stops_at_reboot=stops)
        return protocol.answer(request)

    # -- the command and the hook ------------------------------------------------------------------

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
            case "blocks" if self.record.state is State.HELD:
                self._saved_blocks.take(self._source.process)
                self._checkpoint()
                return "ok"
            case "retire":
                return await self._retire()
            case "emulator" if argument:
                self.record.emulator = argument
                self._checkpoint()
                return "ok"
            case "revoke" if not self._committing.locked():
                return await self._revoke()
            case "release" if self.record.state is not State.RETIRING:
                self.record.released = True
                self._checkpoint()
                # Not before the reply, which is sent without a pause in this task, is on its way.
                asyncio.get_running_loop().call_soon(self.end.set)
                return "ok"
        return f"error {reason_against_request(self.record.state, request)}"

    def status(self) -> dict[str, object]:
        """What is reported to the command."""
        return {
            "state": self.record.state.value,
            "name": self._config.name,
            "uuid": self._config.uuid,
            "image": str(self._paths.image),
            "emulator": self.record.emulator,
            "destination": self._destination.pid if self._destination else 0,
            "version": self.record.version,
            "restore_began": self.record.restore_began,
            "until_started_ms": self.record.until_started_ms,
            "commit_ms": self.record.commit_ms,
            "move": asdict(self._context_vms.report) if self._context_vms.report else None,
            "reason": self.record.reason[:_TEXT],
            "note": self.record.note[:_TEXT],
        }

    async def _retire(self, *, begun: bool = False) -> str:
        """
        Terminate the source, unless somebody has resumed it since its state was saved.

        :param begun: only if the last keeper had begun it, and nobody has finished it since.
        """
        async with self._retiring:
            if self.record.state in SOURCE_GONE or (begun and self.record.state is not State.RETIRING):
                return "ok"
            self._enter(State.RETIRING)
            if reason := await self._source.stop(self._config.step_timeout * _PART_OF_STEP):
                self._enter(State.HELD)
                return f"error {reason}"
            await self._source.kill()
            self._enter(State.WAITING)
            return "ok"

    async def _finish_retiring(self) -> None:
        """What the last keeper had begun. The command, if there is one, repeats its request and gets the same reply."""
        await self._retire(begun=True)
        if not self.clients.has_command:
            self._command_gone()

    async def _revoke(self) -> str:
        """Make sure that a restore which has failed does not let the guest run after all."""
        process = self._destination
        if self.record.state is State.COMMITTED and process is not None:
            # It is about to run the guest, or has, or never will; and may be too busy to answer.
            await process.freeze(self._config.step_timeout * _PART_OF_STEP)
            if self._has_run():
                process.thaw()
                return f"error {RAN}"
            process.kill()
            if not await process.wait(min(KILL_TIMEOUT, self._config.step_timeout * _PART_OF_STEP)):
                return f"error cannot terminate the new QEMU: process {process.pid} does not exit; see dmesg"
            self._destination = None
            self._enter(State.WAITING)
        if self.record.state is State.RESTORING and not self._has_run():
            self._restore.kill()
            self._enter(State.WAITING)
        if self.record.state is State.WAITING:
            return "ok"
        return f"error {reason_against_request(self.record.state, 'revoke')}"

    async def _hook(self, operation: str, sub: str, uuid: str, pid: int) -> str:
        own = uuid.lower() == self._config.uuid.lower()
        action, reason = at_hook(
            self._facts(operation, sub), operation, sub, own=own, uuid=self._config.uuid, image=self._paths.image
        )
        match action:
            case HookAction.REFUSE:
                return f"error {reason}"
            case HookAction.IGNORE:
                return "foreign"
            case HookAction.BEGIN_RESTORE:
                return self._begin_restore(pid)
            case HookAction.COMMIT:
                return await self._commit()
        return "ok"

    def _facts(self, operation: str, sub: str) -> Facts:
        """No more than decides this step: the guest is stopped meanwhile."""
        if sub != "begin" or operation not in ("restore", "started"):
            return Facts(self.record.state)
        attempt = self._attempt() if operation == "restore" else Attempt.NONE
        return Facts(self.record.state, self._has_run(), self._committing.locked(), attempt)

    def _attempt(self) -> Attempt:
        running = self._destination is not None and self._destination.alive
        return Attempt.IN_PROGRESS if running else self._restore.attempt()

    def _has_run(self) -> bool:
        """Whether the guest has run in a destination, also in one that has exited since."""
        return self._run_mark.read() is not RunState.NOT

    def _begin_restore(self, hook: int) -> str:
        """:return: the emulator for the destination, and whether it is not the first one."""
        self._restore.abandon()
        verdict = "again" if self.record.restore_began else "ok"
        self._restore = Restore.by_parent_of(hook)
        self._destination = None
        self.record.reason, self.record.peer, self.record.restore_began = "", None, time.monotonic()
        self._enter(State.RESTORING)
        clear_monitor(self._paths)
        self._restore.expect(self._config, self._paths)
        return f"{verdict} {self.record.emulator}"

    # -- commit ------------------------------------------------------------------------------------

    async def _commit(self) -> str:
        """
        The commit point of a domain: give the guest to the destination.

        :return: ``ok`` if and only if it may run there.
        """
        async with self._committing:
            began = time.monotonic()
            self.record.until_started_ms = (began - self.record.restore_began) * 1e3
            try:
                probed = await self._restore.probed(self._config.step_timeout)
                try:
                    await self._hand_over(probed)
                except BaseException:
                    await probed.monitor.close()
                    raise
            except TimeoutError as err:
                self.record.reason = "cannot start the guest: the monitor of the new QEMU does not answer"
                hint = "see its log in /var/log/libvirt/qemu, then restore the domain again"
                raise KeeperError(self.record.reason, hint) from err
            except SevhopError as err:
                self.record.reason = str(err)
                raise
            finally:
                self.record.commit_ms = (time.monotonic() - began) * 1e3
            self._destination = probed.process
            self._enter(State.COMMITTED)
            self._tasks.start(self._until_it_runs(probed.process, probed.monitor))
        return "ok"

    async def _hand_over(self, probed: ProbedDestination) -> None:
        self.record.version = probed.monitor.version
        await destination.verify(probed, self._config, self._source.images, self.record.peer)
        self._saved_blocks.write(probed.process, probed.blocks)
        if self._config.context.kind != "none":
            await self._context_vms.move_to(probed.monitor, probed.process, self._config.move_deadline)
        self.record.note = await stop_at_reboot(self._config, probed.monitor)
        await adopt.finish(probed.monitor)

    async def _until_it_runs(self, process: QemuProcess, monitor: Monitor | None) -> None:
        """
        After the commit, until the guest runs or its QEMU has exited.

        :param monitor: None when it must be connected again.
        """
        while process.alive:
            try:
                if monitor is None and not self._has_run():
                    monitor = await destination.reach(process, self._config, self._paths)
                if monitor is not None:
                    await destination.wait_running(monitor, self._run_mark)
            except SevhopError as err:
                log.info("the new QEMU does not respond: %s", err)
                monitor = None
                await process.wait(_REACH_POLL)
                continue
            self._finish(State.OVER)
            return
        # The next restore may have begun.
        if self.record.state is State.COMMITTED and self._destination is process:
            self._destination = None
            state, self.record.reason = after_destination_exit(has_run=self._has_run())
            if state in FINISHED:
                self._finish(state)
            else:
                self._enter(state)
