"""
The hop: replace the QEMU process under a running guest. :class:`Hop` does it outside libvirt; the first half of an
upgrade by way of a transit is one as well (:mod:`sevhop.engine.transit_hop`).

::

    check      nothing is touched: can this guest hop, to this emulator, on this host?
    acquire    take the source's VM, memory and listening sockets                    undo: close them
    prepare    destination started, incoming; stream armed, its header given         undo: terminate it
    stop       source stopped; it begins to save its state                           undo: terminate the destination,
                                                                                           SIGCONT and cont the source
    map        the destination maps the guest's RAM; private RAM blocks are copied
    save       the device state is forwarded
    load       source halted (SIGSTOP); the destination has loaded everything
    COMMIT     one ioctl in the destination moves the SEV context                    no rollback, only completion
    resume     the destination runs the guest
    finish     source killed, its paths and sockets are the destination's

Each phase is a function that returns what it has made; what undoes it is pushed on the rollback stack where it is made
(:mod:`sevhop.engine.transaction`). Before COMMIT every failure, also SIGINT and SIGTERM, ends with the guest in the
source as it was, unless the source itself exits. A guest without SEV context has nothing to move: right before its
destination starts it, it reports that to the keeper (:mod:`sevhop.keeper.local`), which can refuse it, and that report
is the commit: in ``load`` if the destination starts on its own, in ``resume`` otherwise; for a guest that stays paused
it is the end of ``commit``. Whatever exits then, the run mark (:mod:`sevhop_qmp.run_mark`) records whether the guest
has run there.

At no moment can two QEMUs run the guest: the source is resumed only after the destination is known to have exited, and
the destination is resumed only when the source has stopped (and, with SEV, the kernel has made it unable to run). When
its state has been saved the source is halted and executes nothing, so nobody else can resume it either.
"""

from __future__ import annotations

import abc
import socket
from pathlib import Path

from ..events import Listener, ignore
from ..options import HopOptions
from .check import Acquired, Checked, acquire, check
from .commit import commit, resume
from .finish import finish
from .prepare import Prepared, prepare
from .start import Started, explaining_exit
from .transaction import Transaction
from .transfer import load, map_memory, save, stop


class HopPhases(Transaction):
    """
    The script of every hop. What differs is where the source comes from, how the destination is started, and what
    becomes of the source in the end.
    """

    def __init__(self, guest: str, options: HopOptions, listener: Listener = ignore) -> None:
        super().__init__(guest, listener)
        self.options = options

    @abc.abstractmethod
    async def check_source(self) -> Checked:
        """Nothing is touched: can this guest hop?"""

    @abc.abstractmethod
    async def acquire_source(self, checked: Checked) -> Acquired:
        """Take what the destination adopts, and the environment of its process."""

    async def prepare_destination(self, checked: Checked, acquired: Acquired) -> Prepared:
        """Start the destination, and compare it with the source."""
        return await prepare(self, self.options, checked, acquired)

    @abc.abstractmethod
    async def finish_hop(self, checked: Checked, acquired: Acquired, prepared: Prepared, started: Started) -> None:
        """The guest is in the destination: give it what it has not yet."""

    async def _script(self) -> None:
        options = self.options
        checked = await self.run_phase("check", self.check_source())
        acquired = await self.run_phase("acquire", self.acquire_source(checked))
        prepared = await self.run_phase("prepare", self.prepare_destination(checked, acquired))
        async with explaining_exit(checked, prepared.started.destination):
            stopped = await self.run_phase("stop", stop(self, checked, prepared))
            await self.run_phase("map", map_memory(prepared))
            await self.run_phase("save", save(prepared))
            await self.run_phase("load", load(self, options, checked, prepared, stopped))
            started = await self.run_phase("commit", commit(self, options, checked, acquired, prepared, stopped))
        async with explaining_exit(checked, started.destination):
            started = await self.run_phase(
                "resume", resume(self, options, checked, acquired, prepared, stopped, started)
            )
        await self.run_phase("finish", self.finish_hop(checked, acquired, prepared, started))


class Hop(HopPhases):
    """A hop of a guest that runs outside libvirt."""

    def __init__(
        self,
        qmp: Path,
        options: HopOptions = HopOptions(),
        listener: Listener = ignore,
        *,
        connection: socket.socket | None = None,
    ) -> None:
        """
        :param qmp: the source's QMP socket.
        :param connection: to it, if there is one already; the hop closes it.
        """
        super().__init__(str(qmp), options, listener)
        self._qmp = qmp
        self._connection = connection

    async def check_source(self) -> Checked:
        """See :func:`.check.check`."""
        return await check(self, self._qmp, self.options, self._connection)

    async def acquire_source(self, checked: Checked) -> Acquired:
        """See :func:`.check.acquire`."""
        return await acquire(self, checked)

    async def finish_hop(self, checked: Checked, acquired: Acquired, prepared: Prepared, started: Started) -> None:
        """See :func:`.finish.finish`."""
        await finish(self, self.options, checked, acquired, prepared, started)
