"""
What a keeper does whose guest runs in the transit: it has the guest hop into what libvirt restores.

Any client's restore of the image does that. When libvirt's hook reports ``restore begin`` the keeper expects a QEMU;
when libvirt has accepted that one, the guest hops into it (:mod:`sevhop.engine.second_hop`), in this process. Whatever
fails before leads back to the transit, where the guest runs all the time.

The states are in :mod:`sevhop.keeper.state`, what the hook is answered in :mod:`sevhop.keeper.transit_state`. What
outlives a keeper of a restore in progress is in :mod:`sevhop.keeper.transit_attempt`; its successor continues there,
unless the guest was just hopping: then it is where the run mark says.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shutil
import socket

from sevhop_qmp import adopt
from sevhop_qmp.errors import SevhopError
from sevhop_qmp.monitor import peer_credentials
from sevhop_qmp.process import QemuProcess

from ..engine.second_hop import Meeting, RestoredDestination, SecondHop, Stream
from ..engine.stopped_guest import resume_source
from ..errors import GuestState, HopError
from ..options import HopOptions
from . import destination
from .clients import Clients
from .config import KeeperConfig, KeeperError
from .fdstore import FdStore
from .handover import SourceHandles
from .paths import KeeperPaths
from .record import KeeperRecord
from .restore import clear_monitor
from .state import FINISHED, IN_TRANSIT, HookAction, State, reason_against_request
from .tasks import Tasks
from .transit_attempt import TransitAttempt
from .transit_state import at_hook
from .transit_watch import End, TransitWatch

log = logging.getLogger(__name__)

#: The part of the step timeout for one of the waits of a request, whose reply is waited for that long.
_PART_OF_STEP = 0.8
#: Characters of the longest reason or note in a message.
_TEXT = 300
#: States of the guest after which it is the destination's.
_ARRIVED = frozenset({GuestState.RUNNING_IN_NEW, GuestState.PAUSED_IN_NEW})
#: Seconds between two attempts to reach a transit that does not answer.
_POLL = 0.1


class TransitServer:
    """
    What the keeper has and what it does with it. Made once, before the first keeper is forked; each keeper begins with
    :meth:`restore`.

    :ivar record: what has happened so far.
    :ivar clients: who is connected.
    :ivar end: set when nobody needs the keeper any more.
    """

    def __init__(self, config: KeeperConfig, paths: KeeperPaths, handles: SourceHandles) -> None:
        assert config.transit is not None
        self._config = config
        self._transit = config.transit
        self._paths = paths
        self._handles = handles
        self._process = QemuProcess.open(config.pid)
        self._watch = TransitWatch(config.transit, config.pid, config.step_timeout)
        self._fd_store = FdStore({}, {})
        self._tasks = Tasks()
        self._attempt: TransitAttempt | None = None
        self._pursuing: asyncio.Task[None] | None = None
        self._hop: SecondHop | None = None
        self.record = KeeperRecord(config.emulator, State.TRANSIT)
        self.clients = Clients(config.command, self._command_gone)
        self.end = asyncio.Event()

    # -- what outlives the keeper --------------------------------------------------------------------

    def restore(self, fd_store: FdStore) -> None:
        """Begin, where the last keeper was."""
        self._fd_store = fd_store
        stored, descriptors = fd_store.record, dict(fd_store.descriptors)
        if stored:
            self.record = KeeperRecord.from_fields(stored["record"])
            if stored["attempt"]:
                self._attempt = self._new_attempt(descriptors)
                self._attempt.restore(stored["attempt"], descriptors)
        else:
            self._checkpoint()
        if self.record.released or self.record.state in FINISHED:
            self.end.set()
            return
        self._tasks.start(self.clients.watch_command())
        self._tasks.start(self._watch_transit())
        if self._attempt is not None:
            interrupted = self.record.state is State.HOPPING
            work = self._settle_interrupted(self._attempt) if interrupted else self._pursue(self._attempt)
            self._pursuing = self._tasks.start(work)

    def _new_attempt(self, stored: dict[str, int] | None = None) -> TransitAttempt:
        return TransitAttempt(self._config, self._paths, self._handles, self._process, self._peer_known, stored)

    def _peer_known(self) -> None:
        assert self._attempt is not None
        self.record.peer = self._attempt.port.peer
        self._checkpoint()

    def _checkpoint(self) -> None:
        """Store the state: whatever comes next is done by this keeper or by its successor."""
        attempt, descriptors = self._attempt, {}
        if attempt is not None:
            descriptors = attempt.descriptors(hopping=self.record.state is State.HOPPING)
        stored = {"record": self.record.as_fields(), "attempt": attempt.as_fields() if attempt else None}
        needed = self.record.state in IN_TRANSIT and not self.record.released
        self._fd_store.store(stored, descriptors, needed=needed)

    def _enter(self, state: State) -> None:
        log.info("state %s", state.value)
        self.record.state = state
        self._checkpoint()

    # -- its end -------------------------------------------------------------------------------------

    def terminate(self) -> None:
        """On SIGTERM."""
        if self.record.state in FINISHED:
            self.end.set()

    def _command_gone(self) -> None:
        if self.record.state in FINISHED:
            self.end.set()

    def _finish(self, state: State) -> None:
        self._enter(state)
        shutil.rmtree(self._transit.directory, ignore_errors=True)
        if not self.clients.has_command:
            self.end.set()

    # -- requests ------------------------------------------------------------------------------------

    def accept_destination(self, sock: socket.socket) -> None:
        """A process with adopt.so has connected: only while libvirt restores the domain is there a destination."""
        if self._attempt is None or self.record.state is not State.RESTORING:
            with sock, contextlib.suppress(OSError):
                sock.send(b"error the hook of sevhop did not announce this QEMU")
            return
        self._attempt.port.accept(sock)

    async def answer_control(self, sock: socket.socket, request: bytes) -> tuple[str, int | None]:
        """A request and its arguments; never raises."""
        try:
            match request.decode().split(" "):
                case ["hook", operation, sub, uuid]:
                    return await self._at_hook(operation, sub, uuid, peer_credentials(sock)[0]), None
                case [name, *arguments]:
                    self.clients.add_command(sock)
                    return await self._command(name, " ".join(arguments)), None
        except UnicodeDecodeError:
            pass
        except SevhopError as err:
            return f"error {err}", None
        except Exception as err:
            log.exception("%r", request)
            return f"error unexpected {type(err).__name__}: {err}", None
        return "error invalid request", None

    async def answer_hook(self, sock: socket.socket, request: str) -> str:
        """The same for a hook whose call was forwarded."""
        return (await self.answer_control(sock, request.encode()))[0]

    async def _command(self, request: str, argument: str) -> str:
        match request:
            case "status":
                return f"ok {json.dumps(self.status())}"
            case "emulator" if argument:
                self.record.emulator = argument
                self._checkpoint()
                return "ok"
            case "revoke" if self.record.state in IN_TRANSIT:
                await self._end_attempt()
                if self.record.state is State.TRANSIT:
                    return "ok"
            case "release" if self.record.state in FINISHED:
                self.record.released = True
                self._checkpoint()
                # Not before the reply, which is sent without a pause in this task, is on its way.
                asyncio.get_running_loop().call_soon(self.end.set)
                return "ok"
        return f"error {reason_against_request(self.record.state, request)}"

    def status(self) -> dict[str, object]:
        """What is reported to the command."""
        attempt = self._attempt
        return {
            "state": self.record.state.value,
            "name": self._config.name,
            "uuid": self._config.uuid,
            "image": str(self._paths.image),
            "emulator": self.record.emulator,
            "destination": attempt.destination.pid if attempt and attempt.destination else self.record.peer or 0,
            "version": self.record.version,
            "transit": self._config.pid,
            "transit_version": self._watch.version,
            "downtime_ms": self.record.commit_ms,
            "until_started_ms": self.record.until_started_ms,
            "commit_ms": self.record.commit_ms,
            "move": None,
            "reason": self.record.reason[:_TEXT],
            "note": self.record.note[:_TEXT],
        }

    async def _at_hook(self, operation: str, sub: str, uuid: str, pid: int) -> str:
        own = uuid.lower() == self._config.uuid.lower()
        begins = own and (operation, sub) == ("restore", "begin")
        restoring = begins and self._restoring
        action, reason = at_hook(
            self.record.state,
            operation,
            sub,
            own=own,
            restoring=restoring,
            uuid=self._config.uuid,
            image=self._paths.image,
        )
        match action:
            case HookAction.REFUSE:
                return f"error {reason}"
            case HookAction.IGNORE:
                return "foreign"
            case HookAction.BEGIN_RESTORE:
                return await self._begin_restore(pid)
        return "ok"

    @property
    def _restoring(self) -> bool:
        """Whether a restore is in progress that may yet succeed."""
        if self.record.state in (State.MET, State.HOPPING):
            return True
        return self._attempt is not None and self._attempt.in_progress

    # -- a restore -----------------------------------------------------------------------------------

    async def _begin_restore(self, hook: int) -> str:
        """:return: the emulator for the destination, and whether it is not the first one."""
        # libvirt waits for this hook, and does not answer meanwhile.
        await self._end_attempt(superseded=True)
        if self.record.state is not State.TRANSIT:
            return f"error {reason_against_request(self.record.state, 'restore the guest')}"
        clear_monitor(self._paths)
        self._attempt = attempt = self._new_attempt()
        attempt.begun_by(hook)
        verdict = "again" if self.record.restore_began else "ok"
        self.record.reason, self.record.peer = "", None
        self.record.restore_began = asyncio.get_running_loop().time()
        self._enter(State.RESTORING)
        self._pursuing = self._tasks.start(self._pursue(attempt))
        return f"{verdict} {self.record.emulator}"

    async def _end_attempt(self, *, superseded: bool = False) -> None:
        """
        End a restore in progress, unless it is too late for that; wait until it is over.

        :param superseded: by another one; then libvirt is not asked why the destination has exited.
        """
        pursuing = self._pursuing
        if pursuing is None or self._attempt is None:
            return
        self._attempt.superseded = superseded
        if self._hop is not None:
            self._hop.interrupt()
        else:
            pursuing.cancel()
        await asyncio.wait({pursuing}, timeout=self._config.step_timeout * _PART_OF_STEP)

    async def _pursue(self, attempt: TransitAttempt) -> None:
        """From the hook's ``restore begin`` on, until the guest has hopped or runs in the transit again."""
        try:
            probed = await attempt.unless_ended(destination.probe(self._config, self._paths))
            if attempt.destination is None or probed.process.pid != attempt.destination.pid:
                await probed.monitor.close()
                raise KeeperError(f"process {probed.process.pid} is the new QEMU, and has not asked for the guest")
            if probed.lost:
                await probed.monitor.close()
                raise KeeperError(probed.lost, "choose another version of QEMU, or one with these features")
            await self._hop_into(attempt, probed)
        except asyncio.CancelledError:
            await self._back(attempt, "the restore was ended")
        except SevhopError as err:
            await self._failed(attempt, err)
        except Exception as err:
            log.exception("second hop")
            await self._back(attempt, f"unexpected {type(err).__name__}: {err}")
        finally:
            self._hop = None
            if self._pursuing is asyncio.current_task():
                self._pursuing = None

    async def _hop_into(self, attempt: TransitAttempt, probed: destination.ProbedDestination) -> None:
        config, monitor = self._config, await self._watch.connected()
        self.record.version = probed.monitor.version
        with probed.monitor.events("RESUME") as resumed:

            async def accepted() -> None:
                """libvirt says "cont" when its hooks have returned and it has no reason left to end the destination."""
                if attempt.accepted:
                    return
                await attempt.unless_ended(probed.monitor.next_event(resumed, timeout=config.step_timeout))
                attempt.accepted = True
                self._enter(State.MET)

            def header_given() -> None:
                attempt.header_given = True
                self._checkpoint()

            def announced() -> None:
                attempt.announced = True
                self._checkpoint()

            def stopping(running: bool) -> None:
                self.record.was_paused = not running
                self._enter(State.HOPPING)
                attempt.give_stream()

            meeting = Meeting(
                monitor=monitor,
                transit=self._process,
                destination=RestoredDestination(probed.process, self._paths.directory, probed.monitor),
                uid=config.uid,
                gid=config.gid,
                notice=attempt.port,
                run_mark=attempt.run_mark,
                stream=Stream(attempt.reader, attempt.duplicate_of_writer(), attempt.header_given),
                header_given=header_given,
                announced=announced,
                accepted=accepted,
                stopping=stopping,
            )
            self._hop = SecondHop(config.name, meeting, HopOptions(step_timeout=config.step_timeout))
            try:
                report = await self._hop.run()
            finally:
                await probed.monitor.close()
        self.record.note = "; ".join(report.notes)
        self.record.commit_ms = report.downtime_ms or 0.0
        await self._arrived(attempt)

    async def _failed(self, attempt: TransitAttempt, failure: SevhopError) -> None:
        if isinstance(failure, HopError) and failure.guest_state in _ARRIVED:
            self.record.note = str(failure)
            await self._arrived(attempt)
        else:
            await self._back(attempt, str(failure))

    async def _settle_interrupted(self, attempt: TransitAttempt) -> None:
        """The last keeper has died while the guest was hopping."""
        process = attempt.destination
        if process is not None and process.alive:
            # It cannot begin to run the guest while it is halted.
            await process.freeze(self._config.step_timeout * _PART_OF_STEP)
            attempt.port.revoke_start()
            if attempt.has_run:
                process.thaw()
        if attempt.has_run:
            await self._arrived(attempt)
        else:
            await self._back(attempt, "the keeper has died")
        self._pursuing = None

    async def _arrived(self, attempt: TransitAttempt) -> None:
        """The guest is the destination's: end the transit."""
        self._process.kill()
        process = attempt.destination
        if process is not None and process.alive:
            with contextlib.suppress(SevhopError):
                async with await destination.reach(process, self._config, self._paths) as monitor:
                    await adopt.finish(monitor)
        await self._process.wait(self._config.step_timeout)
        self._attempt = None
        self._finish(State.OVER)
        attempt.close()

    async def _back(self, attempt: TransitAttempt, reason: str) -> None:
        """The guest is the transit's: end the destination, and see that the guest runs."""
        log.info("back to the transit: %s", reason)
        self.record.reason = reason
        killed = attempt.destination
        if killed is not None:
            killed.kill()
            await killed.wait(self._config.step_timeout)
        while self._process.alive:
            self._process.thaw()
            try:
                await self._resume_transit()
                break
            except SevhopError as err:
                log.info("the transit does not run the guest: %s", err)
                await asyncio.sleep(_POLL)
        asks = attempt.announced and not attempt.superseded
        by_client = asks and await self._watch.destroyed_by_client(self._config)
        self._attempt = None
        self._enter(State.TRANSIT)
        attempt.close()
        if by_client:
            await self._end(End("destroyed by a client", "destroy"))

    async def _resume_transit(self) -> None:
        """What a hop that was interrupted has stopped, runs again; what else has stopped the guest stays as it is."""
        monitor = await self._watch.connected()
        with contextlib.suppress(SevhopError):
            await monitor.remove_fds()
        if self.record.state is State.HOPPING:
            await resume_source(monitor, running=not self.record.was_paused)

    # -- the guest in the transit --------------------------------------------------------------------

    async def _watch_transit(self) -> None:
        end = await self._watch.until_ended()
        await self._end_attempt()
        if self.record.state in IN_TRANSIT:
            await self._end(end)

    async def _end(self, end: End) -> None:
        """The guest is off: end the transit, and do what the domain's XML asks for."""
        self._process.kill()
        await self._process.wait(self._config.step_timeout)
        self.record.reason = end.reason
        self._enter(State.ENDED)
        if end.action == "restart":
            self.record.note = await self._watch.start_domain(self._config)
        self._finish(State.ENDED)
