"""
The first hop of an upgrade by way of a transit: the guest of a domain hops into a QEMU beside libvirt, while libvirt
still has the domain. ::

    check      can a transit carry this guest? Its command line is derived from libvirt's for the new emulator
    acquire    take the source's VM and memory, its taps and logs, and the environment of its process
    prepare    the transit is started beside the source, in its namespaces, as its user
    stop ...   as in every hop (:mod:`sevhop.engine.hop`); by way of libvirt's monitor, unless the source has one for us
               (:mod:`sevhop.libvirt.own_monitor`)
    finish     the guest is the transit's. The source is left halted, and libvirt still believes in it

Until the commit every failure is rolled back to the source, as in a hop outside libvirt, and libvirt sees no more than
a guest that was paused and resumed. Trying out the new emulator is this hop itself. How libvirt then gets rid of the
source is :func:`sevhop.engine.retire.retire`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sevhop_qmp import adopt
from sevhop_qmp.errors import ProcessError, RamError, SevhopError
from sevhop_qmp.monitor import SourceMonitor
from sevhop_qmp.process import QemuProcess

from ..cancellation import shielded
from ..disks.block_graph import BlockGraph
from ..errors import RecoveryRequired, Refused
from ..events import Listener, ignore
from ..guest import command_line, inspection, reboot, saved_settings
from ..keeper.handover import SourceHandles
from ..libvirt import domain_xml, own_monitor
from ..libvirt.connection import Connection
from ..libvirt.domain import Domain
from ..libvirt.source_monitor import DomainSourceMonitor
from ..options import HopOptions
from ..process import launch
from ..process.apparmor_profile import ProfileCopy
from ..process.machine_cgroup import MachineCgroup
from ..records.journal import JournalError
from . import present_cards, transit_command_line
from .check import Acquired, Checked
from .destination import LaunchContext
from .finish import activate_disks
from .guest_paths import GuestPaths
from .hop import HopPhases
from .prepare import Prepared
from .source_watch import SourceWatch
from .start import Started
from .stopped_guest import verify_alive
from .transaction import CommitState
from .transit import Transit, leave_reboot_mark
from .transit_blockers import blocker
from .transit_command_line import Untransitable
from .transit_descriptors import InheritedDescriptors, namespaces_to_enter

_ANOTHER = "choose another version of QEMU"


@dataclass(frozen=True)
class TransitSource:
    """
    A domain that was checked (:func:`sevhop.engine.upgrade_prepare.check`).

    :ivar source: its QEMU.
    :ivar disks: as that reports them.
    :ivar xml: the domain as it runs, without what earlier hops have added.
    :ivar emulator: the QEMU that the transit is started from.
    :ivar flag: see :class:`sevhop.checks.registers.Registers`.
    """

    connection: Connection
    domain: Domain
    source: QemuProcess
    disks: BlockGraph
    xml: str
    emulator: str
    flag: int = 0


class TransitHop(HopPhases):
    """
    The hop of a domain's guest into a transit. :meth:`run` it once.

    :param recorder: called with what a recovery must know, before it is done; see
        :class:`sevhop.records.hop_record.HopRecord`. The guest may be stopped (``downtime.running``): then it must not
        wait for the disk.
    :ivar transit: has the guest, when :meth:`run` has returned. Its monitor stays connected.
    :ivar settings: run-time settings that the guest had in the source; see :mod:`sevhop.guest.saved_settings`.
    """

    def __init__(
        self,
        subject: TransitSource,
        options: HopOptions = HopOptions(),
        listener: Listener = ignore,
        recorder: Callable[..., None] = lambda **fields: None,
    ) -> None:
        super().__init__(subject.domain.name, options, listener)
        self.report.kind = "domain"
        self.transit: Transit | None = None
        self.settings = ""
        self._subject = subject
        self._recorder = recorder
        self._environment: dict[str, str] = {}
        self._descriptors = InheritedDescriptors(subject.source)

    def record(self, **fields: Any) -> None:
        """
        The journal is that of the upgrade.

        :raises JournalError: it cannot be written, and the hop can still be rolled back.
        """
        try:
            self._recorder(**fields)
        except JournalError as err:
            if self.state is CommitState.UNDOABLE:
                raise
            self.note(err.message)

    async def check_source(self) -> Checked:
        """
        Nothing is touched.

        :raises Refused: this guest cannot hop into a transit; the cause is an :exc:`Untransitable` if that is why.
        """
        subject, source = self._subject, self._subject.source
        try:
            monitor = await self._connect()
            self.rollback.push(lambda: verify_alive(source))
            self.report.source_pid, self.report.source_version = source.pid, monitor.version
            self.report.emulator = subject.emulator
            watch = self.resources.enter_context(SourceWatch.begin(monitor))
            guest = await inspection.inspect(monitor, source)
            self.report.context = guest.context.kind
            if reason := blocker(subject.xml, source):
                raise Untransitable(reason)
            arguments = await self._command_line(monitor, guest)
        except SevhopError as err:
            raise Refused(err.message, err.hint) from err
        if guest.state != "running":
            self.downtime.disown()
        derived = command_line.Derived(subject.emulator, arguments)
        return Checked(monitor, source, guest, subject.disks, watch, derived, "/", subject.flag, transit=True)

    async def _connect(self) -> SourceMonitor:
        """:raises SevhopError: the source does not answer."""
        subject, timeout = self._subject, self.options.step_timeout
        own = await self.resources.enter_async_context(own_monitor.opened(await subject.domain.monitor(), timeout))
        if own is not None:
            return own
        return await self.resources.enter_async_context(
            DomainSourceMonitor.opened(subject.connection, subject.domain, subject.source, timeout)
        )

    async def _command_line(self, monitor: SourceMonitor, guest: inspection.Guest) -> list[str]:
        subject = self._subject
        argv = subject.source.command_line[1:]
        xml = domain_xml.with_emulator(domain_xml.without_interfaces(subject.xml), subject.emulator)
        try:
            self._environment, (_, *arguments) = await subject.connection.command_line(xml)
        except SevhopError as err:
            hint = err.hint or _ANOTHER
            raise Refused(f"libvirt cannot start the domain in {subject.emulator}: {err.message}", hint) from err
        cards = await present_cards.read(monitor, argv, subject.emulator)
        self.resources.callback(self._descriptors.close)
        arguments = transit_command_line.derive(arguments, argv, cards, self._descriptors)
        return command_line.with_machine_type(arguments, guest.machine_type)

    async def acquire_source(self, checked: Checked) -> Acquired:
        """
        Take the source's VM and memory, and the environment of its process.

        :raises Refused: the memory behind a backend cannot be identified for certain, or the transit cannot enter
            a namespace of the source.
        """
        source = checked.source
        try:
            handles = SourceHandles.take_machine(source, checked.guest.blocks.values())
        except RamError as err:
            raise Refused(err.message, err.hint) from err
        self.resources.callback(handles.close)
        try:
            launch_context = self._launch_context(source)
            profile = await self._profile(source)
        except Untransitable as err:
            raise Refused(err.message, err.hint) from err
        try:
            score = launch.oom_score_adj(source.pid)
        except OSError as err:
            raise ProcessError(f"process {source.pid} has exited") from err
        self.record(oom_score_adj=score)
        return Acquired(handles, launch_context._replace(profile=profile), GuestPaths([]), score)

    def _launch_context(self, source: QemuProcess) -> LaunchContext:
        context = LaunchContext.of(source)
        self.resources.callback(context.close)
        # Not the source's: libvirt's log of the domain must have no writer left when the next QEMU starts.
        for number in (context.stdout, context.stderr):
            null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            os.dup2(null, number, inheritable=False)
            os.close(null)
        namespaces = namespaces_to_enter(source)
        for namespace in namespaces:
            self.resources.callback(os.close, namespace)
        return context._replace(
            environment=launch.inheritable(self._environment),
            namespaces=namespaces,
            cgroups=self._cgroups(source),
            keep=tuple(self._descriptors.numbers),
        )

    def _cgroups(self, source: QemuProcess) -> MachineCgroup | None:
        cgroups = MachineCgroup.beside(source)
        if cgroups is not None:
            # The transit is terminated before that, by an undo that is pushed later.
            self.rollback.push(cgroups.remove)
            self.record(cgroups=cgroups.directories)
        return cgroups

    async def prepare_destination(self, checked: Checked, acquired: Acquired) -> Prepared:
        """
        Start the transit, and compare it with the source.

        :raises SevhopError: another client has changed the domain meanwhile.
        """
        prepared = await super().prepare_destination(checked, acquired)
        self.settings = saved_settings.dump(reboot.settings_after_hop(checked.guest, prepared.settings), None)
        self.record(settings=self.settings)
        if domain_xml.without_additions(await self._subject.domain.xml()) != self._subject.xml:
            raise SevhopError("another client has changed the domain", "try again")
        if reboot.stops(checked.guest) and (note := await leave_reboot_mark(prepared.started.destination)):
            self.note(note)
        return prepared

    async def _profile(self, source: QemuProcess) -> ProfileCopy | None:
        """
        A loaded copy of the source's profile.

        :raises Untransitable: there is none.
        """
        try:
            profile = ProfileCopy.of(source.confinement)
        except SevhopError as err:
            raise Untransitable(err.message) from err
        if profile is not None:
            self.rollback.push(profile.remove)  # by then the transit has exited, as above
            self.record(apparmor_profile=profile.label.profile)
            try:
                await shielded(asyncio.to_thread(profile.load))
            except SevhopError as err:
                raise Untransitable(f"its QEMU is confined ({profile.original}): {err.message}") from err
        return profile

    async def finish_hop(self, checked: Checked, acquired: Acquired, prepared: Prepared, started: Started) -> None:
        """
        The guest is in the transit, for good.

        :raises RecoveryRequired: the transit has exited.
        """
        destination = started.destination
        cgroups, profile = acquired.launch_context.cgroups, acquired.launch_context.profile
        self.transit = Transit(
            destination,
            prepared.guest,
            () if cgroups is None else tuple(cgroups.directories),
            "" if profile is None else profile.label.profile,
        )
        await activate_disks(self, prepared, started)
        destination.protect(acquired.oom_score_adj, self.note)
        try:
            await adopt.finish(destination.monitor)
        except SevhopError as err:
            raise RecoveryRequired(f"the transit does not answer: {err.message}") from err
