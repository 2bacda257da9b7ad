"""
Two QEMUs that are not there, for the real engine and the real recovery: a source with a guest, and a destination.

What is simulated is what a QEMU, adopt.so in it, and the kernel do; who decides is not. Whoever acts on them (the
command that hops, a recovery) waits at a gate before each of its actions, so that anything may happen in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sevhop.disks.block_graph import BlockGraph
from sevhop.engine import hop as engine
from sevhop.engine import prepare, realtime, stopped_guest, transfer
from sevhop.engine.check import Acquired, Checked
from sevhop.engine.destination import Destination
from sevhop.engine.guest_paths import GuestPaths
from sevhop.engine.hop import Hop
from sevhop.engine.hop_recovery import InterruptedHop
from sevhop.engine.interrupted_qemu import NewQemu, OldQemu
from sevhop.engine.recovery_result import RecoveredGuest
from sevhop.engine.source_watch import SourceWatch
from sevhop.engine.start import Started
from sevhop.engine.stopped_guest import verify_alive
from sevhop.guest.command_line import Derived
from sevhop.guest.inspection import SevContext
from sevhop.keeper.handover import SourceHandles
from sevhop.keeper.local import LocalKeeper
from sevhop.options import HopOptions
from sevhop.records.hop_record import HopRecord, Process
from sevhop.report import Report
from sevhop_qmp.errors import MonitorClosed, MonitorTimeout, SevhopError, StateError
from sevhop_qmp.process import Descriptor
from sevhop_qmp.run_mark import RunMark, RunState

#: Pids that no kernel gives.
SOURCE, DESTINATION = (1 << 30) + 1, (1 << 30) + 2


class Broken(AssertionError):
    """Something happened that never may."""


class Listener:
    """What stands in for a :class:`qemu.qmp.EventListener`."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._events: list[dict[str, Any]] = []

    def emit(self, name: str) -> None:
        """An event happens."""
        if name in self._names:
            self._events.append({"event": name})

    def empty(self) -> bool:
        return not self._events

    def clear(self) -> list[dict[str, Any]]:
        events, self._events = self._events, []
        return events


@dataclass
class Qemu:
    """
    One QEMU process.

    :ivar running: whether it runs the guest, if it is not halted.
    :ivar loaded: whether it has all of the guest.
    :ivar listeners: of its events.
    """

    pid: int
    alive: bool = True
    halted: bool = False
    running: bool = False
    loaded: bool = False
    ran: bool = False
    listeners: list[Listener] = field(default_factory=list)

    def emit(self, event: str) -> None:
        """To all listeners."""
        for listener in self.listeners:
            listener.emit(event)

    @property
    def executes(self) -> bool:
        """Whether the guest executes there, now."""
        return self.alive and self.running and not self.halted

    @property
    def answers(self) -> bool:
        return self.alive and not self.halted


class Actor:
    """A hop or a recovery: a task that waits at a gate. When it is killed it never proceeds."""

    def __init__(self) -> None:
        self.task: asyncio.Task[Any]
        self.dead = False
        self.over = False
        self._gates: list[asyncio.Future[None]] = []

    async def gate(self) -> None:
        """Wait until the test lets it do its next step."""
        if not self.over:
            gate = asyncio.get_running_loop().create_future()
            self._gates.append(gate)
            try:
                await gate
            finally:
                if gate in self._gates:
                    self._gates.remove(gate)
        if self.over:
            raise MonitorClosed("the test is over")

    def open_gate(self) -> bool:
        """:return: whether it waited at one."""
        if self.dead or not self._gates:
            return False
        self._gates.pop(0).set_result(None)
        return True

    def end(self) -> None:
        """All its further steps fail, so that nothing of it is left."""
        self.dead = self.over = True
        for gate in self._gates:
            if not gate.done():
                gate.set_result(None)


class World:
    """
    The two processes, and what may never happen.

    :ivar moved_on: the guest has run in the destination: the memory and disks are not the source's any more.
    """

    def __init__(self, directory: Path, *, running: bool) -> None:
        self.directory = directory
        self.running = running
        self.source = Qemu(SOURCE, running=running, loaded=True)
        self.destination: Qemu | None = None
        self.moved_on = False
        self.mark: RunMark | None = None  # the source's own descriptor of it
        self.keeper: socket.socket | None = None  # the destination's end of the connection
        self.destination_mark = -1
        self.notify_keeper = False
        self.step = ""  # of the destination
        self.given = False
        self.stream_ended = False
        self.entry: HopRecord | None = None  # the journal; None when there is none
        self.wishes_to_stop = not running
        self._closing = contextlib.ExitStack()

    def close(self) -> None:
        self._closing.close()

    # -- what never may happen ---------------------------------------------------------------------

    def look(self) -> None:
        """:raises Broken: it has."""
        executes = [qemu for qemu in (self.source, self.destination) if qemu is not None and qemu.executes]
        if len(executes) > 1:
            raise Broken("the guest runs in both QEMUs")
        if self.destination is not None and self.destination.executes:
            self.moved_on = True
        if self.source.executes and self.moved_on:
            raise Broken("the guest runs in the old QEMU, with memory and disks that have moved on")

    def holders(self) -> list[Qemu]:
        """Those that have the guest as it is now."""
        found = [] if self.moved_on else [self.source]
        if self.destination is not None and self.destination.loaded:
            found.append(self.destination)
        return [qemu for qemu in found if qemu.alive]

    def killed_by_us(self, qemu: Qemu) -> None:
        """
        :raises Broken: it was the last one that had the guest.
        """
        if self.holders() == [qemu]:
            raise Broken(f"process {qemu.pid} was killed, and nobody else had the guest")
        self.die(qemu)

    def die(self, qemu: Qemu) -> None:
        qemu.alive = False
        if qemu is self.destination and self.keeper is not None:
            self.keeper.close()
            self.keeper = None

    # -- a monitor's commands ----------------------------------------------------------------------

    def cont(self, qemu: Qemu) -> None:
        """As QEMU and, in a destination, adopt.so do it."""
        if qemu is self.destination and not self._before_run(qemu):
            return
        qemu.running = True
        qemu.emit("RESUME")
        self.look()

    def stop(self, qemu: Qemu) -> None:
        """As QEMU does it: one that does not run emits nothing."""
        if qemu.running:
            qemu.running = False
            qemu.emit("STOP")

    def _before_run(self, qemu: Qemu) -> bool:
        if not qemu.ran:
            notify, self.notify_keeper = self.notify_keeper, False
            if notify and not self._notify_keeper():
                self.die(qemu)
                return False
            self._write_mark(RunState.RAN)
            qemu.ran = True
        return True

    def _notify_keeper(self) -> bool:
        self._write_mark(RunState.STARTING)
        if self._send_run() or not self.source.alive:
            return True
        self._write_mark(RunState.NOT)
        return False

    def _write_mark(self, state: RunState) -> None:
        os.pwrite(self.destination_mark, bytes([state]), 0)

    def _send_run(self) -> bool:
        assert self.keeper is not None
        try:
            self.keeper.send(b"run")
        except OSError:
            return False
        return True

    # -- the destination's own steps ---------------------------------------------------------------

    def start_destination(self, keeper: LocalKeeper, mark: RunMark) -> Qemu:
        assert self.destination is None
        self.directory.mkdir()
        self.keeper = socket.socket(fileno=os.dup(keeper.theirs.fileno()))
        self.keeper.setblocking(False)
        self.destination_mark = os.dup(mark.fileno())
        self._closing.callback(os.close, self.destination_mark)
        self.notify_keeper = True
        self.destination = Qemu(DESTINATION)
        self.step = "waits"
        return self.destination

    def keep_mark(self, mark: RunMark) -> None:
        """The source was given it by add-fd."""
        self.mark = RunMark(os.dup(mark.fileno()))
        self._closing.callback(self.mark.close)

    def destination_step(self, command_is_dead: bool) -> bool:
        """
        Let it do what it does next: load, leave its mark, notify the keeper, run.

        :return: whether there was anything to do.
        """
        qemu = self.destination
        if qemu is None or not qemu.answers:
            return False
        match self.step:
            case "waits" if self.given and self.stream_ended:
                qemu.loaded = True
                self.step = "loaded"
            case "waits" if command_is_dead:  # it has closed its pipe
                self.die(qemu)
            case "loaded" if self.running and not qemu.ran and self.notify_keeper:
                self._write_mark(RunState.STARTING)
                self.step = "starting"
            case "starting":
                self.step = "sent" if self._send_run() else "refused"
            case "refused":
                self._write_mark(RunState.NOT)
                self.die(qemu)
            case "sent":
                self._write_mark(RunState.RAN)
                self.notify_keeper = False
                qemu.ran = True
                qemu.running = True
                self.step = "runs"
            case _:
                return False
        self.look()
        return True


class SimulatedProcess:
    """What stands in for a :class:`sevhop_qmp.process.QemuProcess`, in the hands of one actor."""

    executable = "/qemu"
    threads: tuple[int, ...] = ()

    def __init__(self, world: World, actor: Actor, qemu: Qemu) -> None:
        self._world = world
        self._actor = actor
        self._qemu = qemu
        self.pid = qemu.pid

    @property
    def alive(self) -> bool:
        return self._qemu.alive and not self._actor.over

    async def lives_on(self) -> bool:
        return self.alive

    @property
    def frozen(self) -> bool:
        return self._qemu.alive and self._qemu.halted

    def thread_states(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def halt(self) -> None:
        if not self._actor.dead:
            self._qemu.halted = self._qemu.halted or self._qemu.alive

    async def freeze(self, timeout: float, states: object = None) -> bool:
        await self._actor.gate()
        self._qemu.halted = self._qemu.halted or self._qemu.alive
        return self._qemu.alive

    def thaw(self) -> None:
        if not self._actor.dead:
            self._qemu.halted = False
            self._world.look()

    def kill(self) -> None:
        if not self._actor.dead and self._qemu.alive:
            self._world.killed_by_us(self._qemu)

    async def wait(self, timeout: float) -> bool:
        await self._actor.gate()
        return not self._qemu.alive

    def descriptors(self) -> list[Descriptor]:
        marked = self._world.mark is not None and self._qemu is self._world.source
        return [Descriptor(7, "/memfd:sevhop-run-mark (deleted)")] if marked and self._qemu.alive else []

    def duplicate(self, number: int) -> int:
        assert self._world.mark is not None
        return os.dup(self._world.mark.fileno())

    def close(self) -> None:
        pass


class SimulatedMonitor:
    """What stands in for a :class:`sevhop_qmp.monitor.Monitor`."""

    version = "0.0.0"
    timeout = 0.0
    name = "simulated"

    def __init__(self, world: World, actor: Actor, qemu: Qemu) -> None:
        self._world = world
        self._actor = actor
        self._qemu = qemu
        self.peer = qemu.pid
        self._hung_up = False

    @property
    def closed(self) -> bool:
        return self._hung_up or not self._qemu.alive

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float | None = None
    ) -> Any:
        await self._actor.gate()
        if self.closed:
            raise MonitorClosed(f"QEMU hung up during {command}")
        if self._qemu.halted:
            raise MonitorTimeout(f"QEMU did not answer {command}")
        match command:
            case "stop":
                self._world.stop(self._qemu)
            case "cont":
                self._world.cont(self._qemu)
                if not self._qemu.alive:
                    raise MonitorClosed("QEMU hung up during cont")
            case "query-status":
                loading = self._qemu is self._world.destination and not self._qemu.loaded
                status = "running" if self._qemu.running else "inmigrate" if loading else "paused"
                return {"running": self._qemu.running, "status": status}
            case "x-sev-adopt-status":
                facts = dict.fromkeys(("context", "source", "ram"), "")
                numbers = (
                    "emulated-launch-commands",
                    "deferred-regions",
                    "refused-starts",
                    "vm-type",
                    "vcpus",
                    "deferred-registers",
                    "protected-state-offset",
                    "listeners",
                )
                flags = {"moved": False, "finished": False, "ran": self._qemu.ran, "memfds": []}
                return facts | dict.fromkeys(numbers, 0) | flags
            case "x-sev-adopt-ram":
                self._world.notify_keeper = False
                return {"mappings": 1, "bytes": 1}
            case "query-fdsets" | "query-named-block-nodes" | "query-block" | "query-block-exports":
                return []
        return {}

    async def add_fd(self, fd: int) -> tuple[int, int]:
        await self.execute("add-fd")
        self._world.keep_mark(RunMark(fd))
        return 1, 7

    async def remove_fds(self) -> None:
        await self.execute("remove-fd")

    @contextlib.contextmanager
    def events(self, *names: str) -> Iterator[Listener]:
        listener = Listener(names)
        self._qemu.listeners.append(listener)
        try:
            yield listener
        finally:
            self._qemu.listeners.remove(listener)

    misses_events = False

    async def has_events(self, listener: Listener) -> bool:
        await self._actor.gate()
        return not listener.empty()

    @contextlib.contextmanager
    def on_first_data(self, act: Callable[[], None]) -> Iterator[None]:
        act()
        yield

    async def close(self) -> None:
        self._hung_up = True

    async def __aenter__(self) -> SimulatedMonitor:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class SimulatedState:
    """Both sides of the device state's way: outgoing and incoming."""

    def __init__(self, world: World, actor: Actor) -> None:
        self._world = world
        self._actor = actor
        self._begun = False

    async def __aenter__(self) -> SimulatedState:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def arm(self, *_: int) -> None:
        await self._actor.gate()

    def begin(self, *, timeout: float) -> None:
        self._begun = True

    def send_first_byte(self) -> None:
        pass

    async def forward(self, *, timeout: float) -> None:
        await self._actor.gate()
        if not self._world.source.alive:
            raise MonitorClosed("QEMU hung up during xen-save-devices-state")
        self._world.given = True

    async def end(self, *, timeout: float) -> None:
        await self._actor.gate()
        destination = self._world.destination
        assert destination is not None
        if not destination.alive:
            raise StateError("cannot load the device state into the new QEMU: it stopped reading")
        self._world.stream_ended = True

    async def abandon(self) -> bool:
        await self._actor.gate()
        return self._begun

    async def loaded(self, *, timeout: float) -> None:
        destination = self._world.destination
        assert destination is not None
        while True:
            await self._actor.gate()
            if not destination.alive:
                raise MonitorClosed("QEMU hung up while an event was awaited")
            if destination.halted:
                raise MonitorTimeout("no event from QEMU")
            if destination.loaded and (destination.ran or not self._world.running):
                return


class SimulatedJournal:
    """What stands in for a :class:`sevhop.records.journal.Journal`."""

    def __init__(self, world: World, actor: Actor, entry: HopRecord) -> None:
        self._world = world
        self._actor = actor
        world.entry = entry

    def write(self, facts: Mapping[str, Any], *, flush: bool = True) -> None:
        if not self._actor.dead:
            assert self._world.entry is not None
            self._world.entry = self._world.entry.with_fields(
                {name: vars(fact) if isinstance(fact, Process) else fact for name, fact in facts.items()}
            )

    def end(self) -> None:
        if not self._actor.dead:
            self._world.entry = None

    def leave(self) -> None:
        pass


@dataclass
class _RamBlockSync:
    def sync(self) -> int:
        return 0


class _NoDisks:
    """What stands in for a :class:`sevhop.disks.disk_guard.DiskGuard`."""

    graph = BlockGraph({}, {}, ())
    spares_given_up = False

    async def verify_unchanged_when_stopped(self) -> None:
        pass

    async def verify_given_up(self, monitor: object, *, again: bool, verify_stopped: object) -> None:
        pass

    async def lost_bitmaps(self, monitor: object) -> list[str]:
        return []


@dataclass
class _Anything:
    """Has the attributes that it was given."""

    def __init__(self, **attributes: object) -> None:
        vars(self).update(attributes)


class SimulatedHop(Hop):
    """The engine, with phases that have no real QEMU. Use :meth:`simulate` first."""

    def __init__(self, world: World) -> None:
        super().__init__(Path("/monitor"), HopOptions(step_timeout=0.0))
        self.world = world
        self.actor = Actor()
        self.report = Report(guest="guest")
        self._keeper: LocalKeeper | None = None

    def killed(self) -> None:
        """What the kernel does when the command is killed: its end of the keeper's connection is closed."""
        self.actor.dead = True
        if self._keeper is not None and self._keeper._ours.fileno() >= 0:
            self._keeper._loop.remove_reader(self._keeper._ours)
            with contextlib.suppress(OSError):
                self._keeper._ours.shutdown(socket.SHUT_RDWR)

    @classmethod
    def simulate(cls, patch: pytest.MonkeyPatch) -> None:
        """Replace everything that needs real QEMUs."""
        patch.setattr(engine, "check", cls._check)
        patch.setattr(engine, "acquire", cls._acquire)
        patch.setattr(prepare, "start_destination", cls._start_destination)
        patch.setattr(prepare, "_compare", cls._compare)
        patch.setattr(prepare, "_copy_settings", cls._copy_settings)
        patch.setattr(prepare, "OutgoingState", lambda monitor, incoming: incoming)
        patch.setattr(transfer, "verify_unchanged", cls._verify_unchanged)
        patch.setattr(realtime, "boosted", lambda *threads, **options: contextlib.nullcontext())
        patch.setattr(gc, "freeze", lambda: None)
        patch.setattr(stopped_guest, "CONT_DEADLINE", 0.0)

    async def _check(self, *_: object) -> Checked:
        world = self.world
        source: Any = SimulatedProcess(world, self.actor, world.source)
        self.rollback.push(lambda: verify_alive(source))
        monitor: Any = SimulatedMonitor(world, self.actor, world.source)
        watch = self.resources.enter_context(SourceWatch.begin(monitor))
        status = "running" if world.running else "paused"
        guest: Any = _Anything(state=status, context=SevContext("none"), vcpu_threads=frozenset())
        record = HopRecord(
            kind="standalone",
            guest="guest",
            context="none",
            running=world.running,
            source=Process(SOURCE, 1),
            monitor="/monitor",
            directory=str(world.directory),
        )
        self._journal = SimulatedJournal(world, self.actor, record)  # type: ignore[assignment]
        return Checked(monitor, source, guest, BlockGraph({}, {}, ()), watch, Derived("/qemu", []), "/")

    async def _acquire(self, *_: object) -> Acquired:
        identity: Any = _Anything(credentials=_Anything(uid=0, gid=0))
        return Acquired(SourceHandles(None, {}), identity, GuestPaths([]), 0)

    async def _start_destination(
        self, options: object, checked: Checked, acquired: Acquired, arguments: object, run_mark: RunMark
    ) -> Started:
        world = self.world
        self._keeper = self.resources.enter_context(LocalKeeper(acquired.handles, SevContext("none"), run_mark))
        qemu = world.start_destination(self._keeper, run_mark)
        process: Any = SimulatedProcess(world, self.actor, qemu)
        destination = Destination(process, world.directory)
        destination.monitor = SimulatedMonitor(world, self.actor, qemu)  # type: ignore[assignment]
        self.record(destination=Process(DESTINATION, 1))
        incoming: Any = SimulatedState(world, self.actor)
        return Started(destination, self._keeper, incoming, None)

    async def _compare(self, options: object, checked: Checked, *_: object) -> Any:
        return checked.guest, (None, None), _NoDisks(), _RamBlockSync()

    async def _copy_settings(self, *_: object) -> None:
        pass

    @staticmethod
    async def _verify_unchanged(checked: Any, _: object) -> None:
        await checked.monitor._actor.gate()


class SimulatedRecovery:
    """The recovery of an interrupted hop."""

    def __init__(self, world: World) -> None:
        self.actor = Actor()
        self._world = world
        self.result: RecoveredGuest | None = None
        self.stuck: SevhopError | None = None

    async def run(self) -> None:
        world, entry = self._world, self._world.entry
        assert entry is not None
        old = OldQemu(self._process(world.source), entry.monitor, entry.run_mark, 0.0)
        new = NewQemu(self._process(world.destination), world.directory, 0.0)
        try:
            self.result = await InterruptedHop(old, new, 0.0).settle(entry)
        except SevhopError as err:
            self.stuck = err
        else:
            if not self.actor.dead:
                world.entry = None

    def _process(self, qemu: Qemu | None) -> Any:
        alive = qemu is not None and qemu.alive and self._world.entry is not None
        return SimulatedProcess(self._world, self.actor, qemu) if alive and qemu is not None else None

    async def connect(self, address: Path | str, **_: object) -> SimulatedMonitor:
        """Instead of :meth:`sevhop_qmp.monitor.Monitor.connect`."""
        await self.actor.gate()
        qemu = self._world.source if str(address) == "/monitor" else self._world.destination
        if qemu is None or not qemu.alive:
            raise MonitorClosed(f"{address}: Connection refused")
        if qemu.halted:
            raise MonitorTimeout(f"{address}: no QMP greeting")
        return SimulatedMonitor(self._world, self.actor, qemu)
