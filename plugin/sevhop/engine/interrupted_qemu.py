"""
The two QEMUs of an interrupted hop outside libvirt: what they do now, and what can be done to them.

:mod:`sevhop.engine.ownership` decides what is done, and :mod:`sevhop.engine.hop_recovery` does it by what is here.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from sevhop_qmp import adopt
from sevhop_qmp.errors import CommandError, MonitorError, ProcessError, SevhopError
from sevhop_qmp.monitor import Events, SourceMonitor
from sevhop_qmp.process import QemuProcess
from sevhop_qmp.run_mark import RunMark, RunState

from ..disks import block_graph
from . import ownership, protected_state
from .destination import Destination, connect
from .stopped_guest import halt, resume_guest, resume_source, resumed_by_another


class OldQemu:
    """
    The source.

    :param process: None if it has exited.
    :param monitor: path of its QMP socket.
    :param mark: inode of the run mark that it was given.
    :param timeout: seconds for each step.
    """

    def __init__(self, process: QemuProcess | None, monitor: str, mark: int, timeout: float) -> None:
        self.process = process
        self._path = monitor
        self._mark = mark
        self._timeout = timeout
        self._monitor: SourceMonitor | None = None
        self._resumes: Events | None = None
        self._listening = contextlib.ExitStack()

    @property
    def alive(self) -> bool:
        """Whether the process exists; a halted one does."""
        return self.process is not None and self.process.alive

    def run_state(self) -> RunState | None:
        """The run mark that the hop has given to it; None if it has none."""
        if self.process is None or not self._mark:
            return None
        try:
            mark = RunMark.find(self.process, self._mark)
        except ProcessError:
            return None
        if mark is None:
            return None
        try:
            return mark.read()
        finally:
            mark.close()

    async def probe(self) -> ownership.Source:
        """What it does. It is queried only if it is not halted."""
        if self.process is None or not self.process.alive:
            return ownership.Source.ENDED
        if self.process.frozen:
            return ownership.Source.HALTED
        try:
            monitor = await self._connected()
            running = bool((await monitor.execute("query-status"))["running"])
        except SevhopError:
            return ownership.Source.SILENT if self.alive else ownership.Source.ENDED
        return ownership.Source.RUNS if running else ownership.Source.STOPPED

    async def halt(self) -> None:
        """
        From now on it executes nothing, so nobody can resume the guest in it.

        :raises SevhopError: somebody has, since the last :meth:`probe`; or it cannot be halted.
        """
        if self.process is None or self.process.frozen:
            return
        await halt(self.process, self._timeout)
        if self._monitor is not None and self._resumes is not None and await self._monitor.has_events(self._resumes):
            raise resumed_by_another()

    async def resume(self, *, running: bool, reboot_action: str = "") -> str:
        """
        Continue the process, and resume the guest.

        :param running: whether the guest is to run.
        :param reboot_action: to be set before; see :mod:`sevhop.engine.protected_state`.
        :return: its run state.
        :raises SevhopError: it cannot be resumed.
        """
        assert self.process is not None
        self.process.thaw()
        monitor = await self._connected()
        await protected_state.set_reboot_action(monitor, reboot_action)
        state = await resume_source(monitor, running=running)
        with contextlib.suppress(MonitorError, CommandError):
            await monitor.remove_fds()
        return state

    async def terminate(self) -> None:
        """Kill it: its state is outdated."""
        if self.process is not None:
            self.process.kill()
            await self.process.wait(self._timeout)

    async def close(self) -> None:
        """Hang up."""
        self._listening.close()
        if self._monitor is not None:
            await self._monitor.close()
            self._monitor = None

    async def _connect(self, process: QemuProcess) -> SourceMonitor:
        return await connect(process, self._path, timeout=self._timeout)

    async def _connected(self) -> SourceMonitor:
        """
        :raises MonitorError: it does not answer, or the path leads to another process.
        """
        assert self.process is not None
        if self._monitor is not None and self._monitor.closed:
            await self.close()
        if self._monitor is None:
            self._monitor = await self._connect(self.process)
            self._resumes = self._listening.enter_context(self._monitor.events("RESUME"))
        return self._monitor


@dataclass(frozen=True)
class ProbedDestination:
    """
    What a destination was probed to do.

    :ivar ran, moved: see :class:`sevhop_qmp.adopt.AdoptStatus`; ``ran`` is None if it does not answer.
    :ivar status: QEMU's run state.
    """

    destination: ownership.Destination
    ran: bool | None = None
    moved: bool = False
    status: str = ""


class NewQemu:
    """
    The destination.

    :param process: None if it has exited, or was never started.
    :param directory: that its monitor is in.
    :param timeout: seconds for each step.
    """

    def __init__(self, process: QemuProcess | None, directory: Path, timeout: float) -> None:
        self.process = process
        self._directory = directory
        self._timeout = timeout
        self._reached: Destination | None = None

    @property
    def alive(self) -> bool:
        """Whether the process exists; a halted one does."""
        return self.process is not None and self.process.alive

    async def probe(self) -> ProbedDestination:
        """What it does, and what it reports."""
        if self.process is None or not self.process.alive:
            return ProbedDestination(ownership.Destination.ENDED)
        try:
            monitor = (await self._destination()).monitor
            adopted = await adopt.adopt_status(monitor)
            status = await monitor.execute("query-status")
        except SevhopError:
            await self.close()
            return ProbedDestination(ownership.Destination.SILENT if self.alive else ownership.Destination.ENDED)
        if status["running"]:
            seen = ownership.Destination.RUNS
        elif status["status"] == "inmigrate":
            seen = ownership.Destination.LOADING
        else:
            seen = ownership.Destination.LOADED
        return ProbedDestination(seen, adopted.ran, adopted.moved, str(status["status"]))

    async def halt(self) -> None:
        """It executes nothing until :meth:`thaw`, or until it is terminated."""
        if self.process is not None:
            await self.process.freeze(self._timeout)

    def thaw(self) -> None:
        """Undo :meth:`halt`."""
        if self.process is not None:
            self.process.thaw()

    async def terminate(self) -> None:
        """
        Kill it: the guest is elsewhere.

        :raises SevhopError: it still exists.
        """
        if self.process is not None:
            await self.close()
            await Destination(self.process, self._directory).kill()

    async def resume_guest(self) -> None:
        """
        :raises SevhopError: it does not run the guest.
        """
        monitor = (await self._destination()).monitor
        await adopt.adopt_ram(monitor)  # otherwise it would report to the keeper, which is gone
        await resume_guest(monitor)

    async def activate_images(self) -> None:
        """
        The guest stays paused, so no ``cont`` activates them.

        :raises SevhopError: they cannot be activated.
        """
        await block_graph.activate((await self._destination()).monitor)

    async def take(self) -> Destination:
        """Connected to it, and the caller's to release."""
        destination = await self._destination()
        self._reached = None
        return destination

    async def close(self) -> None:
        """Hang up."""
        if self._reached is not None:
            await self._reached.monitor.close()
            self._reached = None

    async def _destination(self) -> Destination:
        assert self.process is not None
        if self._reached is None:
            self._reached = await Destination.reach(self.process, self._directory, timeout=self._timeout)
        return self._reached
