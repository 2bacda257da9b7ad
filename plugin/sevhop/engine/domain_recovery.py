"""
Recover for a domain of libvirt: see :mod:`sevhop.engine.recovery`.

===================================  ==================================================================
its old QEMU is there                it goes on in there, the keeper lets go
the keeper waits                     the domain is restored from the image, in the new emulator, or the old
somebody restores it                 that is waited for
it runs, the keeper is done          the persistent definition gets the new emulator
it ran there, and that QEMU ended    the guest is gone, which is said
neither a QEMU nor a keeper          the guest is gone, which is said
===================================  ==================================================================

The domain is the one with the UUID in the journal, whatever it is called now, and another one of its name is none of
ours. A QEMU that this hop did not start is never ended: if one runs the domain while its guest is held, that is for a
person to decide.
"""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import time
from pathlib import Path

from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import QemuProcess

from ..disks import block_graph
from ..errors import NeedsRecover
from ..guest import runtime_settings
from ..keeper.client import KeeperError, KeeperProcess, State
from ..libvirt import domain_xml
from ..libvirt.connection import NO_DOMAIN, Connection, Domain, DomainError
from ..records import run_directory
from ..records.journal import Entry, Journal
from . import upgrade
from .hop import STOPPED
from .recovery_result import End, Recovered

#: Seconds for which something is waited for that is under way, such as a restore that somebody else has begun.
RESTORE_TIMEOUT = 60.0
_POLL = 0.05


async def finish_or_undo(mine: Journal, *, named: bool) -> Recovered:
    """
    Bring the hop of a domain to its end.

    :param named: whether it was asked for this domain. One that was prepared on purpose waits for that.
    :raises SevhopError: that is not possible now; nothing of the guest is lost by it.
    """
    entry = mine.entry
    connection = await Connection.open(entry.uri)
    try:
        keeper = await _keeper(entry)
        source = entry.source.open()
        try:
            return await _Interrupted(entry, connection, keeper, source).finish_or_undo(named)
        finally:
            if keeper is not None:
                keeper.close()
            if source is not None:
                source.close()
    finally:
        connection.close()


async def _keeper(entry: Entry) -> KeeperProcess | None:
    directory = Path(entry.directory) if entry.directory else run_directory.hop_of(entry.guest)
    if directory is None:
        return None
    try:
        keeper = await KeeperProcess.connect(directory)
        if (await keeper.status())["uuid"] == entry.uuid:
            return keeper
        keeper.close()
    except KeeperError:
        pass
    return None


class _Interrupted:
    """A hop that was broken off."""

    def __init__(
        self,
        entry: Entry,
        connection: Connection,
        keeper: KeeperProcess | None,
        source: QemuProcess | None,
    ) -> None:
        self._entry = entry
        self._connection = connection
        self._keeper = keeper
        self._source = source

    async def finish_or_undo(self, named: bool) -> Recovered:
        state = await self._settled()
        if self._source is not None and state in (State.HELD, None):
            return await self._go_on_in_source(self._source)
        if state is State.WAITING and self._entry.phase == "prepared" and not named:
            return Recovered(
                self._entry.guest,
                End.UNDER_WAY,
                f"held; go on with virsh restore {self._kept().image}, or sevhop recover {self._entry.guest}",
            )
        if state is State.WAITING:
            return await self._restore()
        if state is State.OVER:
            return await self._define()
        if state is State.LOST:
            await self._let_go()
            return Recovered(self._entry.guest, End.GONE, "it ran in the new QEMU, which has ended")
        return await self._without_keeper()

    async def _settled(self) -> State | None:
        """How far the keeper has come, when nothing is under way any more; None without a keeper."""
        if self._keeper is None:
            return None
        deadline = time.monotonic() + RESTORE_TIMEOUT
        while True:
            try:
                status = await self._keeper.status()
            except KeeperError:
                self._keeper = None
                return None
            state = State(status["state"])
            if state is State.RESTORING and not await self._active():
                # Its last restore came to nothing, and it may be tried again.
                return State.WAITING
            if state not in (State.RETIRING, State.RESTORING, State.COMMITTED):
                return state
            if state is State.COMMITTED and not self._entry.running:
                return State.OVER  # the guest stays paused
            if time.monotonic() > deadline:
                raise NeedsRecover(f"what the keeper does comes to no end: it is {state.value}", "see virsh list")
            await asyncio.sleep(_POLL)

    def _kept(self) -> KeeperProcess:
        assert self._keeper is not None
        return self._keeper

    async def _domain(self) -> Domain:
        domain = await self._connection.domain_with(self._entry.uuid)
        if domain is None:
            raise SevhopError(f"libvirt knows no domain with UUID {self._entry.uuid}", "see virsh list --all")
        return domain

    async def _active(self) -> Domain | None:
        """The domain, if it has a QEMU as far as libvirt knows. One that was not persistent is unknown without."""
        domain = await self._connection.domain_with(self._entry.uuid)
        try:
            return domain if domain is not None and await domain.active() else None
        except DomainError as err:
            if err.code == NO_DOMAIN:
                return None
            raise

    async def _see_nobody_else_runs_it(self) -> None:
        """:raises NeedsRecover: the domain has a QEMU, which this hop did not start."""
        domain = await self._active()
        if domain is None:
            return
        try:
            pid = domain.living_pid()
        except DomainError as err:
            if await self._active() is None:
                return  # it has just ended
            raise NeedsRecover(f"domain {domain.name} is active while its guest is held: {err.message}") from err
        if pid is not None and not self._kept().has_started(pid):
            raise NeedsRecover(
                f"somebody has started domain {domain.name} while its guest is held: process {pid} is not of this hop",
                f"decide which of the two is to live: to go on with the one that is held, run virsh destroy "
                f"{shlex.quote(domain.name)}, then sevhop recover {shlex.quote(self._entry.guest)}",
            )
        # A destination that failed, or has ended without libvirt noticing; not one that is about to run after all.
        await self._kept().revoke()
        await domain.end()

    async def _go_on_in_source(self, source: QemuProcess) -> Recovered:
        source.thaw()  # a keeper that was killed may have left it halted
        domain = await self._domain()
        if domain.living_pid() != source.pid:
            raise NeedsRecover(
                f"its old QEMU (process {source.pid}) is there, but libvirt has another one for domain {domain.name}",
                "see which of the two has the guest",
            )
        monitor = await domain.monitor()
        status = await monitor.execute("query-status")
        # One that has shut down since, had an I/O error, or was paused by somebody else, stays as it is.
        ours = status["running"] or (status["status"] in STOPPED and self._entry.stopped)
        if self._entry.running and ours and not await domain.running():
            await domain.resume()
        elif not status["running"]:
            await block_graph.activate(monitor)
        await block_graph.activate_spares(monitor)
        with contextlib.suppress(SevhopError):
            await monitor.remove_fds()
        await self._let_go()
        return Recovered(self._entry.guest, End.SOURCE)

    async def _restore(self) -> Recovered:
        keeper = self._kept()
        await self._see_nobody_else_runs_it()
        try:
            await self._connection.restore(str(keeper.image))
        except SevhopError as err:
            reason = (await keeper.status())["reason"] or err.message
            await keeper.use(self._entry.old)
            try:
                await self._connection.restore(str(keeper.image))
            except SevhopError as again:
                raise NeedsRecover(
                    f"{reason}; in the old emulator: {again.message}",
                    f"the guest is held; try again with: virsh restore {keeper.image}",
                ) from again
            text = "; ".join([f"in a new process, since {reason}", *await self._finish_settings()])
            await self._take_images()
            await self._let_go()
            return Recovered(self._entry.guest, End.SOURCE, text)
        return await self._define()

    async def _define(self) -> Recovered:
        note = ""
        try:
            await upgrade.define(self._connection, self._entry.uuid, self._entry.new)
        except (SevhopError, domain_xml.DomainXmlError) as err:
            note = f"the persistent definition still has the old emulator: {err}"
        notes = await self._finish_settings()
        await self._take_images()
        await self._let_go()
        return Recovered(self._entry.guest, End.DESTINATION, "; ".join(filter(None, [note, *notes])))

    async def _take_images(self) -> None:
        """A paused guest has no reason to take its images by itself. If it cannot, it does when it is resumed."""
        if not self._entry.running:
            with contextlib.suppress(SevhopError):
                await block_graph.activate(await (await self._domain()).monitor())

    async def _finish_settings(self) -> list[str]:
        """See :func:`.runtime_settings.finish`."""
        if self._keeper is None:
            return []
        try:
            domain = await self._domain()
            monitor, pid = await domain.monitor(), domain.pid()
        except SevhopError as err:
            return [f"whether all is set as it was cannot be told: {err.message}"]
        moved = self._entry.context != "none"
        return await runtime_settings.finish(self._keeper.directory, monitor, pid, moved=moved)

    async def _without_keeper(self) -> Recovered:
        """Its old QEMU has ended, and no keeper is left."""
        domain = await self._active()
        if domain is None:
            return Recovered(
                self._entry.guest, End.GONE, "neither a QEMU nor a keeper has its memory; start it afresh"
            )
        if domain_xml.describe(await domain.xml()).emulator == self._entry.new:
            return await self._define()
        return Recovered(self._entry.guest, End.SOURCE, "in a new process")

    async def _let_go(self) -> None:
        if self._keeper is not None:
            await self._keeper.release()
