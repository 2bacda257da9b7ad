"""
The upgrade: a domain of libvirt changes its QEMU and keeps its name, UUID, devices and XML.

::

    check      nothing is touched: can this guest hop, to this emulator, on this host?
    hold       a keeper of its own takes the source's VM and memory                  undo: let go
    rehearse   the new emulator loads a trial copy of the device state (:mod:`sevhop.engine.rehearsal`)
    prepare    libvirt learns the new emulator; the source is given a file to save to
    freeze     source suspended, and seen to be stopped                              undo: resume
    save       device state into a save image, private RAM blocks to the keeper      undo: resume
    retire     the source's QEMU ends: the guest is in the keeper and the image      undo: restore in the old emulator
    restore    libvirt starts the destination from the image; before it lets the guest run, it calls our hook, and
               the keeper brings the RAM blocks over and moves the SEV context       COMMIT
    define     the persistent definition gets the new emulator

libvirt cannot have two domains of one UUID, so the source ends before the destination starts. A failure of the restore
brings the guest back in the old emulator, by the same way. Should that fail as well, the guest is still in the keeper
and the image, and ``virsh restore`` tries again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass

from sevhop_qmp import adopt, move
from sevhop_qmp.errors import SevhopError, StateError
from sevhop_qmp.kept_state import KeptState
from sevhop_qmp.monitor import COMMAND_TIMEOUT, Commands, Monitor
from sevhop_qmp.process import OnDisk, QemuProcess

from ..cancellation import shielded
from ..checks import guest as guest_checks
from ..checks.domain import examine
from ..disks import block_graph
from ..disks.block_graph import BlockGraph
from ..disks.disk_guard import DiskGuard
from ..errors import Interrupted, Lost, NeedsRecover, Refused, Undone
from ..events import Listener, MoveTried, ignore
from ..guest import cpu_features, emulator, inspection, runtime_settings
from ..guest.inspection import ENCRYPTED_BLOCKS
from ..keeper.client import Brief, KeeperError, KeeperProcess, State
from ..libvirt import domain_xml, hook, lock_manager
from ..libvirt.connection import NO_DOMAIN, RESTORE_TIMEOUT, Connection, Domain, DomainError, DomainMonitor
from ..libvirt.save_image import SaveImage
from ..process import cgroup_memory
from ..records import journal
from ..records.journal import Entry, Process
from ..report import Phase
from .rehearsal import Rehearsal, Subject
from .rehearsal_command_line import Unrehearsable
from .transaction import Procedure, expected

log = logging.getLogger(__name__)

#: Name of the socket through which libvirt speaks to a QEMU.
_LIBVIRT_MONITOR = "monitor.sock"
#: Seconds in which a monitor greets that nobody holds.
_GREETING_TIMEOUT = 1.0
#: Seconds between two looks at a restore that is somebody else's.
_POLL = 0.05


@dataclass(frozen=True)
class Options:
    """
    What to upgrade, and how patiently.

    :ivar emulator: the QEMU to go to; by default the one that the domain was started from, as it is on disk now.
    :ivar prepare_only: stop when the guest is in the keeper and the image; ``virsh restore`` goes on from there.
    :ivar dry_run: check only.
    :ivar rehearse: have the new emulator load a trial copy of the device state first.
    :ivar step_timeout: seconds that each step in the blackout may take.
    :ivar move_deadline: seconds for which a busy migration is tried again.
    """

    emulator: str | None = None
    prepare_only: bool = False
    dry_run: bool = False
    rehearse: bool = True
    step_timeout: float = COMMAND_TIMEOUT
    move_deadline: float = 2.0


class Upgrade(Procedure):
    """The upgrade of one domain."""

    def __init__(self, uri: str, name: str, options: Options, listener: Listener = ignore) -> None:
        super().__init__(name, listener)
        self.report.kind = "domain"
        self._uri = uri
        self._name = name
        self._options = options
        self._running = False
        self._stopped_as = ""
        self._images_given_up = False
        self._retiring = False
        self._retired = False
        self._rehearsed = False

        # Set by the phase that is named.
        self._connection: Connection  # check
        self._domain: Domain  # check
        self._monitor: DomainMonitor  # check
        self._source: QemuProcess  # check
        self._guest: inspection.Guest  # check
        self._examined_disks: BlockGraph  # check
        self._xml: str  # check
        self._old: str  # check
        self._new: str  # check
        self._keeper: KeeperProcess  # hold
        self._piped: bool  # prepare
        self._displays: list[dict[str, str]]  # prepare
        self._disks: DiskGuard  # prepare
        self._state: KeptState  # prepare

    def _past_undoing(self) -> bool:
        return self._retiring

    def _outcome(self) -> str:
        return "prepared" if self.report.image else "checked" if self._options.dry_run else "done"

    async def _go(self) -> None:
        try:
            await self._do("check", self._check)
            if self._options.dry_run:
                return
            await self._do("hold", self._hold)
            if self._options.rehearse:
                await self._do("rehearse", self._rehearse)
            elif no_way_back := await shielded(asyncio.to_thread(self._no_way_back)):
                self._note(f"not rehearsed, and without a way back: {no_way_back}")
            await self._do("prepare", self._prepare)
            await self._do("freeze", self._freeze)
            await self._do("save", self._save)
            await self._do("retire", self._retire)
        except BaseException as err:
            failure = await self._in_full(self._explain(err))
            if not self._retired:
                await self._in_full(self._put_back(failure))
            if failure is err:
                raise
            raise failure from err
        if self._options.prepare_only:
            self.report.image = self._keeper.image
            self._remember(phase="prepared")
            self._unfinished = True
            return
        try:
            await self._do("restore", self._restore)
        except Lost:
            await self._in_full(self._keeper.release())
            raise
        except SevhopError as err:
            await self._in_full(self._bring_back(err))
        await self._do("define", self._define)

    # -- before the guest is touched ---------------------------------------------------------------

    async def _check(self) -> None:
        try:
            self._connection = await Connection.open(self._uri)
            self._resources.callback(self._connection.close)
            self._domain = await self._connection.domain(self._name)
            # A domain whose hop was broken off may well be off, and then this is why.
            journal.expect_none(self._domain.uuid)
            examined = await self._resources.enter_async_context(
                examine(self._connection, self._domain, self._options.emulator, in_full=True)
            )
        except SevhopError as err:
            raise Refused(err.message, err.hint) from err
        if failures := examined.tree.failures():
            first = failures[0]
            raise Refused(f"{first.name}: {first.detail}", first.remedy)
        self._monitor, self._source, self._guest = examined.monitor, examined.process, examined.guest
        self._examined_disks = examined.disks
        self._xml, self._old, self._new = examined.xml, examined.old, examined.new
        self.report.emulator = self._new
        self.report.context = self._guest.context.kind
        self.report.source_pid = self._source.pid
        self.report.source_version = self._monitor.version
        if not self._options.dry_run:
            await self._begin_journal(
                Entry(
                    kind="domain",
                    guest=self._domain.name,
                    uri=self._uri,
                    uuid=self._domain.uuid,
                    context=self._guest.context.kind,
                    running=self._guest.state == "running",
                    source=Process.of(self._source),
                    old=self._old,
                    new=self._new,
                )
            )

    async def _hold(self) -> None:
        identity = self._source.credentials
        starting = asyncio.ensure_future(KeeperProcess.start(self._brief(identity.uid, identity.gid)))
        try:
            await asyncio.shield(starting)
        finally:
            # Interrupted or not: a keeper that comes up must be told what to do.
            self._keeper = await starting
            self._resources.callback(self._keeper.close)
            self._remember(directory=str(self._keeper.directory))

    def _brief(self, uid: int, gid: int) -> Brief:
        return Brief(
            name=self._domain.name,
            uuid=self._domain.uuid,
            pid=self._source.pid,
            uid=uid,
            gid=gid,
            emulator=self._new,
            context=self._guest.context,
            blocks=tuple(self._guest.blocks.values()),
            disks=self._examined_disks,
            encrypted=tuple(self._encrypted()),
            move_deadline=self._options.move_deadline,
            step_timeout=self._options.step_timeout,
        )

    def _encrypted(self) -> frozenset[str]:
        return frozenset() if self._guest.context.kind == "none" else ENCRYPTED_BLOCKS

    async def _rehearse(self) -> None:
        subject = Subject(
            name=self._domain.name,
            xml=self._xml,
            emulator=self._new,
            monitor=self._monitor,
            process=self._source,
            guest=self._guest,
            encrypted=self._encrypted(),
            directory=self._keeper.directory / "trial",
            domain=self._domain,
            leases=lock_manager.in_use(),
            stopped=lambda by_us: self._remember(stopped=by_us),
        )
        rehearsal = Rehearsal(self._connection, subject, self._options.step_timeout, self._tell)
        try:
            if gained := await rehearsal.run():
                self._note(gained)
            self._rehearsed = True
        except Unrehearsable as err:
            if no_way_back := await shielded(asyncio.to_thread(self._no_way_back)):
                raise Refused(
                    f"it cannot be rehearsed ({err}), and there is no way back: {no_way_back}",
                    "sevhop upgrade --no-rehearsal goes without both: a guest that cannot go on then stays held",
                ) from err
            self._note(f"not rehearsed: {err}")
        finally:
            self.report.rehearsal_ms = rehearsal.pause_ms

    def _no_way_back(self) -> str:
        """Why the guest could not be restored in the QEMU that it runs in; empty if it could."""
        was = self._source.on_disk
        if was is not OnDisk.UNCHANGED:
            return f"the QEMU that it runs in was {was.value} on disk"
        try:
            if os.path.samefile(self._old, f"/proc/{self._source.pid}/exe"):
                return ""
            # A link that leads elsewhere by now, or a program that runs QEMU.
            version = emulator.look(self._old).version
        except (OSError, SevhopError) as err:
            return f"{self._old}: {getattr(err, 'strerror', None) or err}"
        return "" if version == self._monitor.version else f"{self._old} is QEMU {version} by now"

    async def _prepare(self) -> None:
        described = domain_xml.describe(self._xml)
        await self._connection.learn(self._new, described.arch, described.machine, described.kind)
        self._piped = emulator.look(self._new).wants_pipe
        await self._keep_settings()
        self._state = await self._resources.enter_async_context(KeptState(self._monitor, self._guest.machine_type))
        await self._state.arm()
        self._disks = await DiskGuard.over(self._monitor, self._source)
        self._resources.callback(self._disks.close)
        # The keeper has the disks as they were when the domain was examined, and compares the destination's with these.
        if found := block_graph.changes(self._examined_disks, self._disks.graph):
            raise SevhopError(f"somebody else has changed the domain: {found}", "try again")

    async def _keep_settings(self) -> None:
        """What was set in the source since its start, beyond what libvirt knows."""
        self._displays = domain_xml.ports(await self._domain.live_xml())
        settings = await runtime_settings.read(self._monitor, self._source)
        # A rehearsal has compared the processors.
        words = None if self._rehearsed else await cpu_features.words(self._monitor)
        runtime_settings.keep(self._keeper.directory, settings, words)
        if note := cgroup_memory.unaccounted(self._source):
            self._note(note)

    # -- the guest is stopped ----------------------------------------------------------------------

    async def _freeze(self) -> None:
        await self._disks.see_unchanged(self._monitor)
        # Somebody may have paused it since it was examined: then it stays so.
        self._running = bool((await self._monitor.execute("query-status"))["running"])
        if self._running:
            self._remember(stopped=True)
            self._begin_of_blackout()
            await self._domain.suspend()
        elif self._guest.state == "running":
            self._remember(running=False)
        status = await self._monitor.execute("query-status")
        if status["running"]:
            raise SevhopError("the source runs although it was stopped", "somebody else resumes the guest")
        self._stopped_as = status["status"]
        if self._stopped_as not in guest_checks.HOPPABLE_STATES:
            self._stopped_at = None  # something else has stopped it, and it is not ours to resume
            raise SevhopError(f"the guest is {self._stopped_as}", "a guest can hop while it runs or is paused")

    async def _see_source_stopped(self) -> None:
        """That of a guest which ran again until its state was saved would be another."""
        status = await self._monitor.execute("query-status")
        if status["running"] or status["status"] != self._stopped_as:
            raise SevhopError("somebody else has resumed the guest", "try again")

    async def _see_domain_unchanged(self) -> None:
        """The destination gets the devices and disks that the source had when it was examined."""
        if domain_xml.without_additions(await self._domain.xml()) != self._xml:
            raise SevhopError("somebody else has changed the domain", "try again")

    async def _save(self) -> None:
        keeping = asyncio.ensure_future(self._keeper.keep_blocks())
        self._images_given_up = True
        try:
            stream = await self._state.save(timeout=self._options.step_timeout)
        finally:
            await asyncio.wait({keeping})
        keeping.result()
        try:
            await self._disks.see_given_up(
                self._monitor, again=not self._running, see_stopped=self._see_source_stopped
            )
        except StateError:
            await self._see_source_stopped()  # one that runs gives up nothing
            raise
        environment = adopt.environment(self._keeper.socket) | {hook.IMAGE_MARK: "without RAM"}
        monitor = str(self._keeper.monitor)
        xml = domain_xml.for_destination(self._xml, self._new, environment, monitor, self._displays)
        try:
            with open(self._keeper.image, "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                SaveImage(xml, self._running, stream, self._piped).write(file)
        except OSError as err:
            raise SevhopError(f"the save image cannot be written: {err.strerror}") from err

    async def _retire(self) -> None:
        """End the source. From here on the guest is in the keeper and the image, and only there."""
        # Told that its QEMU has hung up, libvirt looks every 200 ms whether it has ended. So libvirt is not told before
        # it has ended: then one look is enough.
        with _left_open(self._connections_of_libvirt()):
            try:
                await self._see_source_stopped()
                await self._disks.see_unchanged_when_stopped()
                await self._see_domain_unchanged()
            except SevhopError:
                # One that has ended by itself, now that everything is saved, is not needed any more. Unless there are
                # two to go on from: the other one's comes first, as we can still say so.
                if self._source.alive or await self._saved_by_another():
                    raise
            self._retiring = True
            try:
                await self._keeper.retire()
            finally:
                self._retired = not self._source.alive
            self._state.source_ended()
            # Not every init reaps at once; then libvirt waits.
            await self._source.wait_reaped(self._options.step_timeout)
            await self._domain.end()

    async def _saved_by_another(self) -> bool:
        with contextlib.suppress(SevhopError):
            return await self._domain.saved()
        return False

    def _connections_of_libvirt(self) -> list[int]:
        with contextlib.suppress(SevhopError):
            return self._source.connections(_LIBVIRT_MONITOR)
        return []

    # -- it goes on ----------------------------------------------------------------------------------

    async def _restore(self) -> None:
        try:
            await self._connection.restore(str(self._keeper.image))
        except DomainError as err:
            if not await self._arrived_all_the_same():
                reason = (await self._keeper.status())["reason"]
                raise SevhopError(reason or err.message) from err
        self._end_of_blackout()
        await self._look()
        if not self._running:
            await self._activate()
        if self._disks.graph.bitmaps():
            with contextlib.suppress(SevhopError):
                for text in await self._disks.lost_bitmaps(await self._domain.monitor()):
                    self._note(text)

    async def _activate(self) -> None:
        """A QEMU that is restored paused has not taken its images (10.0), and would not until it is resumed."""
        try:
            await block_graph.activate(await self._domain.monitor())
        except SevhopError as err:
            self._note(f"the paused guest takes its disks when it is resumed, not now: {err.message}")

    async def _arrived_all_the_same(self) -> bool:
        """
        Whether the guest is in the destination although libvirt does not say so: it may have been killed behind the
        commit, and somebody else may have been quicker with our image. If not, there is no destination any more.

        :raises Lost: it was, and has ended.
        :raises SevhopError: that cannot be told.
        """
        try:
            if not await self._domain.find_again():
                return await self._restored_by_another()
        except DomainError as err:
            if err.code == NO_DOMAIN:
                return await self._restored_by_another()
            raise
        if (await self._keeper.status())["state"] in (State.COMMITTED.value, State.OVER.value):
            with contextlib.suppress(SevhopError):
                # It answers when libvirt has made up its mind about what it has found.
                if not (await self._monitor.execute("query-status"))["running"] and self._running:
                    await self._domain.resume()
                return True
        pid = self._domain.living_pid() if await self._domain.active() else None
        if pid is not None and not self._keeper.has_started(pid):
            raise SevhopError(f"process {pid} runs domain {self._domain.name}, and is not of this hop")
        try:
            await self._keeper.revoke()
        except KeeperError as err:
            self._note(f"libvirt cannot reach the destination, but {err.message}")
            return True
        # It has not run the guest, and cannot any more.
        await self._domain.end()
        return False

    async def _restored_by_another(self) -> bool:
        """Whether somebody else's restore of our image succeeds; if one is under way, its end is waited for."""
        deadline = time.monotonic() + RESTORE_TIMEOUT
        while time.monotonic() < deadline:
            active = await self._is_active()
            status = await self._keeper.status()
            if status["state"] == State.OVER.value:
                return True
            if status["state"] == State.LOST.value:
                raise Lost(f"{status['reason']}, which has ended")
            # One that has ended behind the commit: the keeper is about to find out whether the guest had run there.
            if not active and status["state"] != State.COMMITTED.value:
                return False
            await asyncio.sleep(_POLL)
        raise SevhopError("somebody else restores the domain, and does not come to an end")

    async def _is_active(self) -> bool:
        """One that was not persistent is unknown when it has ended."""
        try:
            return await self._domain.active()
        except DomainError as err:
            if err.code == NO_DOMAIN:
                return False
            raise

    async def _look(self) -> None:
        """Note what the keeper has seen of the destination."""
        status = await self._keeper.status()
        if status["state"] not in (State.COMMITTED.value, State.OVER.value):
            raise SevhopError(status["reason"] or "libvirt restored the domain without our hook")
        self.report.destination_pid = status["destination"]
        self.report.destination_version = status["version"]
        if status["move"]:
            self.report.move = move.MoveReport(**status["move"])
            self._tell(MoveTried(self._named, self.report.move.attempts, self.report.move.errno))
        self.report.phases += [
            Phase("restore: until the hook", status["until_started_ms"]),
            Phase("restore: commit", status["commit_ms"]),
        ]
        moved = self._guest.context.kind != "none"
        for note in await runtime_settings.finish(
            self._keeper.directory, self._monitor, status["destination"], moved=moved
        ):
            self._note(note)

    async def _define(self) -> None:
        """Nothing here can hurt the guest."""
        try:
            try:
                await define(self._connection, self._domain.uuid, self._new)
            except DomainError:
                if not await self._connection.reopen_if_lost():
                    raise
                await define(self._connection, self._domain.uuid, self._new)
        except (SevhopError, domain_xml.DomainXmlError) as err:
            self._note(f"the persistent definition still has the old emulator: {err}")
        # A guest that was paused stays so; its QEMU has everything, and we are not needed.
        await self._keeper.release()

    # -- putting back ------------------------------------------------------------------------------

    async def _put_back(self, failure: SevhopError) -> None:
        """
        The source is still there: let it go on.

        :raises NeedsRecover: it does not.
        """
        if hasattr(self, "_source") and self._source.alive:
            await self._continue_source(failure)
        if hasattr(self, "_keeper"):
            await self._keeper.release()

    async def _continue_source(self, failure: SevhopError) -> None:
        self._source.thaw()
        try:
            try:
                await self._domain.find_again(patience=0)
            except DomainError:
                # libvirt itself is what has failed, and the guest is not to wait for it.
                try:
                    await self._continue_without_libvirt()
                    return
                except SevhopError as err:
                    log.info("%s", err)
                    await self._domain.find_again()
            if self._stopped_at is not None:
                await self._domain.resume()
            await self._take_images_back(self._monitor)
        except SevhopError as err:
            if self._stopped_at is not None and not await self._runs_again():
                raise NeedsRecover(
                    f"{failure.message}; resuming failed: {err.message}", f"virsh resume {shlex.quote(self._name)}"
                ) from failure
        self._end_of_blackout()

    async def _continue_without_libvirt(self) -> None:
        """Its monitor listens, and without a daemon nobody holds it. The next daemon sees by itself how things are."""
        async with await Monitor.connect(self._libvirt_monitor(), greeting_timeout=_GREETING_TIMEOUT) as monitor:
            if self._stopped_at is not None:
                await monitor.execute("cont")
                self._end_of_blackout()
                if lock_manager.in_use():
                    self._note("libvirt does not hold its leases: virsh suspend and virsh resume take them again")
            await self._take_images_back(monitor)
            if hasattr(self, "_state"):
                await self._state.take_back(monitor)

    async def _take_images_back(self, source: Commands) -> None:
        """Those of a guest that is not resumed, which would take them."""
        if self._images_given_up and (self._disks.spares_given_up or self._stopped_at is None):
            await block_graph.activate(source)
        if self._images_given_up:
            for text in await self._disks.lost_bitmaps(source):
                self._note(text)

    def _libvirt_monitor(self) -> str:
        """The socket's path, as it is called from here."""
        listeners = self._source.listeners()
        for fd in listeners.values():
            os.close(fd)
        for _, path, *_ in listeners:
            if path.endswith(f"/{_LIBVIRT_MONITOR}"):
                return f"/proc/{self._source.pid}/root{path}"
        raise SevhopError("the source's monitor does not listen")

    async def _runs_again(self) -> bool:
        with contextlib.suppress(SevhopError):
            return await self._domain.running()
        return False

    async def _bring_back(self, failure: SevhopError) -> None:
        """
        The destination failed: restore the guest in the old emulator.

        :raises Undone: it is back.
        :raises NeedsRecover: it is not, but the keeper and the image have it.
        """
        try:
            await self._keeper.use(self._old)
            await self._restore()
        except Lost:
            await self._keeper.release()
            raise
        except SevhopError as err:
            raise NeedsRecover(
                f"{self._phase}: {failure.message}; in the old emulator: {err.message}",
                f"the guest is held; try again with: virsh restore {self._keeper.image}",
            ) from failure
        await self._keeper.release()
        raise Undone(f"{self._phase}: {failure.message}", failure.hint) from failure

    async def _explain(self, error: BaseException) -> SevhopError:
        """What is raised in the end for an error before the restore."""
        if isinstance(error, asyncio.CancelledError):
            return Interrupted("interrupted")
        if isinstance(error, (Refused, NeedsRecover)):
            return error
        error = expected(error)
        message = f"{self._phase}: {error.message}"
        if self._retired:
            return NeedsRecover(message, f"the guest is held; go on with: virsh restore {self._keeper.image}")
        if hasattr(self, "_source") and not self._source.alive:
            if await self._saved_by_another():
                reason = f"{self._phase}: somebody else has saved the domain"
                return Lost(reason, "the guest goes on when that is restored")
            return Lost(f"{self._phase}: the source's QEMU ended by itself, and the guest with it")
        return Undone(message, error.hint)


async def define(connection: Connection, uuid: str, emulator: str) -> None:
    """
    Let a domain start in another emulator from now on, if it is persistent.

    :raises DomainError: libvirt refuses.
    """
    domain = await connection.domain_with(uuid)
    if domain is not None and await domain.persistent():
        await connection.define(domain_xml.with_emulator(await domain.inactive_xml(), emulator))


@contextlib.contextmanager
def _left_open(descriptors: list[int]) -> Iterator[None]:
    try:
        yield
    finally:
        for fd in descriptors:
            os.close(fd)
