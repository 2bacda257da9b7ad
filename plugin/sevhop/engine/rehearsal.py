"""
The rehearsal: the new emulator loads a copy of the device state, before the guest is touched for real.

It happens in a second QEMU with the domain's own devices, beside the running guest. That one has a private view of the
guest's memory, disks without content and a network of its own (:mod:`sevhop.engine.rehearsal_command_line`), and its
vCPUs never run. ::

    while the guest runs     the rehearsal QEMU is started, and waits for a device state
    during a downtime        the source's state is saved, the rehearsal QEMU loads it
    while the guest runs     the rehearsal QEMU is terminated

The downtime includes the loading, because a virtio device compares what it loads with its rings in the guest's memory,
which must not change meanwhile. The guest is stopped by plain ``stop`` and ``cont``, which libvirt sees as events; with
its own suspend and resume it would take the guest's network down and up. The downtime is bounded, and only SIGKILL
prevents that the guest is resumed. A guest that is paused already stays so. One case is not detected: a ``virsh
suspend`` by another client in those milliseconds finds the guest paused, and libvirt does nothing that we could see.

With a lock manager (lockd, sanlock) that is different: libvirt releases a domain's leases when it sees the stop, and
acquires them again only in its own resume. So libvirt's suspend and resume are used then.

Two versions that cannot load each other's state are refused here, with QEMU's own message, and so is a rehearsal QEMU
that is not the same machine. A domain with a device that cannot be shared cannot be rehearsed, which is noted
(:exc:`.rehearsal_command_line.Unrehearsable`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sevhop_qmp import adopt, ram_blocks
from sevhop_qmp.device_state import IncomingState
from sevhop_qmp.errors import SevhopError, StateError
from sevhop_qmp.monitor import COMMAND_TIMEOUT, Commands
from sevhop_qmp.process import QemuProcess
from sevhop_qmp.saved_device_state import SavedDeviceState

from ..cancellation import shielded
from ..errors import GuestState, RecoveryRequired, Refused
from ..events import GuestResumed, GuestStopped, Listener, ignore
from ..guest import cpu_features, inspection
from ..keeper.handover import SourceHandles
from ..keeper.local import LocalKeeper
from ..libvirt import domain_xml
from ..libvirt.connection import Connection
from ..libvirt.domain import Domain
from ..options import HopOptions
from ..process.namespaces import PROGRAMS, within_namespaces_of
from . import present_cards, protected_state, rehearsal_command_line
from .destination import Destination, LaunchContext
from .isolated_tap import open_tap
from .rehearsal_command_line import Disk, Unrehearsable

log = logging.getLogger(__name__)

#: The longest downtime, as a part of the step timeout: 3 s with the default.
_PART_OF_STEP = 0.3
#: Seconds for ``stop`` and ``cont``: more than libvirt waits for its own jobs of the domain, so that one of the two
#: that timed out is not executed later.
_LIBVIRT_PATIENCE = 40.0
#: Seconds for which a resume is retried when the daemon does not answer, and between two attempts.
_DAEMON_PATIENCE = 30.0
_POLL = 0.1
#: Seconds in which a rehearsal QEMU that has failed exits.
_EXIT_TIMEOUT = 2.0
_SKIP = "sevhop upgrade --no-rehearsal skips the rehearsal"
_ANOTHER = "choose another version of QEMU"
_QDEV = re.compile(r"/machine/peripheral/(?P<id>[^/]+)|/machine/system\.flash(?P<flash>[01])$|(?P<name>[^/]+)$")
_PREFIX = re.compile(r"^[^ ]*qemu[^ :]*: ")
_CONCLUSION = re.compile(r"load of migration failed")
#: Lines of QEMU that make up a reason.
_LINES = 3


@dataclass(frozen=True)
class Subject:
    """
    What is rehearsed.

    :ivar xml: the domain as it runs.
    :ivar emulator: the QEMU to go to.
    :ivar encrypted: names of RAM blocks whose content cannot be copied.
    :ivar directory: created for the rehearsal QEMU, in a place that is cleaned up if we are killed.
    :ivar domain: as libvirt knows it.
    :ivar leases: whether libvirt holds leases for it while it runs.
    :ivar stopped: called before the guest is stopped, and when it was resumed.
    :ivar flag: see :class:`sevhop.checks.registers.Registers`. Resets must be forbidden
        (:mod:`sevhop.engine.protected_state`).
    """

    name: str
    xml: str
    emulator: str
    monitor: Commands
    process: QemuProcess
    guest: inspection.Guest
    encrypted: frozenset[str]
    directory: Path
    domain: Domain
    leases: bool
    stopped: Callable[[bool], None] = lambda by_us: None
    flag: int = 0


class Rehearsal:
    """
    The rehearsal of one upgrade. :meth:`run` it once.

    :ivar downtime_ms: milliseconds for which the guest was stopped; None while it was not.
    """

    def __init__(
        self,
        connection: Connection,
        subject: Subject,
        step_timeout: float = COMMAND_TIMEOUT,
        listener: Listener = ignore,
    ) -> None:
        self.downtime_ms: float | None = None
        self._connection = connection
        self._subject = subject
        self._step_timeout = step_timeout
        self._emit = listener
        self._resources = contextlib.AsyncExitStack()

    async def run(self) -> str:
        """
        Rehearse. Afterwards the guest is in the state that it was in.

        :return: what the new emulator has more than the old one, which is no reason to refuse it.
        :raises Refused: the new emulator does not start, or cannot load the state.
        :raises Unrehearsable: this guest cannot be rehearsed; the upgrade may still work.
        :raises RecoveryRequired: the guest could not be resumed.
        :raises SevhopError: the source does not save its state.
        """
        async with self._resources:
            state = await self._resources.enter_async_context(
                SavedDeviceState(self._subject.monitor, self._subject.guest.machine_type)
            )
            qemu = await self._start()
            incoming = self._resources.enter_context(IncomingState(qemu.monitor))
            try:
                await incoming.arm()
                gained = await self._compare(qemu)
            except SevhopError as err:
                raise self._refused(qemu, [], err) from err
            await state.arm()
            await self._load(state, qemu, incoming)
            return gained

    # -- while the guest runs ------------------------------------------------------------------------

    async def _start(self) -> Destination:
        subject = self._subject
        if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
            raise Refused(f"a rehearsal needs {', '.join(missing)}, which is not installed", _SKIP)
        xml = domain_xml.with_emulator(domain_xml.without_interfaces(subject.xml), subject.emulator)
        try:
            environment, (emulator, *arguments) = await self._connection.command_line(xml)
        except SevhopError as err:
            hint = err.hint or _ANOTHER
            raise Refused(f"libvirt cannot start the domain in {subject.emulator}: {err.message}", hint) from err
        disks = _disks(await subject.monitor.execute("query-block"))
        cards = await present_cards.read(subject.monitor, subject.process.command_line[1:], subject.emulator)
        encrypted = subject.guest.context.kind != "none"
        derived = rehearsal_command_line.derive(
            arguments, subject.process.command_line[1:], disks, cards, encrypted=encrypted
        )
        taps = await self._resources.enter_async_context(_taps(derived.networks))
        for network in derived.networks:
            numbers = [str(tap) for tap in taps[network.name]]
            key = "fd" if len(numbers) == 1 else "fds"
            derived.arguments[:0] = ["-netdev", f"tap,id={network.name},{key}={':'.join(numbers)},vhost=off"]
        handles = SourceHandles.take_machine(subject.process, subject.guest.blocks.values())
        self._resources.callback(handles.close)
        keeper = self._resources.enter_context(LocalKeeper(handles, subject.guest.context))
        with _launch_context(subject.process, environment) as launch_context:
            try:
                qemu = await Destination.start(
                    emulator,
                    derived.arguments,
                    launch_context,
                    keeper,
                    timeout=max(HopOptions.start_timeout, self._step_timeout),
                    command_timeout=self._step_timeout,
                    directory=subject.directory,
                    within=within_namespaces_of(subject.process),
                    keep=[tap for group in taps.values() for tap in group],
                )
            except SevhopError as err:
                raise Refused(f"{subject.emulator} cannot start this domain: {err.message}", _ANOTHER) from err
        self._resources.push_async_callback(qemu.kill)
        return qemu

    async def _compare(self, qemu: Destination) -> str:
        """
        Verify that it is the same machine: with other devices the result would be meaningless.

        :return: the CPU features that the source does not have.
        """
        subject = self._subject
        status = await adopt.adopt_status(qemu.monitor)
        if status.ram != "private":
            raise SevhopError(f"it has not adopted the guest's memory (ram: {status.ram})")
        theirs = await inspection.inspect(qemu.monitor, qemu.process)
        if found := inspection.differences(subject.guest, theirs):
            raise SevhopError("; ".join(found))
        # The same check as when the upgrade commits.
        ram_blocks.private_pairs(subject.guest.blocks, theirs.blocks, encrypted=subject.encrypted)
        words = await cpu_features.feature_words(subject.monitor)
        lost, gained = await cpu_features.compare(subject.monitor, words, qemu.monitor)
        if lost:
            raise SevhopError(lost)
        return gained

    # -- while the guest is stopped --------------------------------------------------------------------

    async def _load(self, state: SavedDeviceState, qemu: Destination, incoming: IncomingState) -> None:
        logged = len(qemu.log_lines())
        limit = self._step_timeout * _PART_OF_STEP
        failure: SevhopError | None = None
        with protected_state.cleared(self._subject.process, self._subject.flag):
            async with self._guest_stopped():
                try:
                    async with asyncio.timeout(limit):
                        stream = await state.save(release_images=False, timeout=limit)
                        failure = await _load_stream(incoming, stream, limit)
                except TimeoutError:
                    failure = StateError(f"it has not loaded the device state within {limit:g} s")
        if failure is not None:
            # QEMU prints the reason before it exits.
            await qemu.process.wait(_EXIT_TIMEOUT)
            raise self._refused(qemu, qemu.log_lines()[logged:], failure) from failure

    @contextlib.asynccontextmanager
    async def _guest_stopped(self) -> AsyncIterator[None]:
        """
        Stop the guest, and resume it whatever happens.

        :raises Refused: another client has resumed it meanwhile, so the rehearsal proves nothing.
        :raises RecoveryRequired: it cannot be resumed.
        """
        monitor = self._subject.monitor
        stops = (await monitor.execute("query-status"))["running"]
        if stops:
            self._emit(GuestStopped(self._subject.name))
        began = time.monotonic()
        try:
            if stops:
                log.info("%s: stopping the guest for the rehearsal", self._subject.name)
                self._subject.stopped(True)
                # Shielded, so that it cannot be executed after what resumes the guest.
                if self._subject.leases:
                    await shielded(self._subject.domain.suspend())
                else:
                    await shielded(monitor.execute("stop", timeout=_LIBVIRT_PATIENCE))
            yield
            intact = not (await monitor.execute("query-status"))["running"]
        finally:
            if stops:
                await shielded(self._resume())
                self._subject.stopped(False)
                self.downtime_ms = (time.monotonic() - began) * 1e3
                self._emit(GuestResumed(self._subject.name, self.downtime_ms))
        if not intact:
            raise Refused(
                "another client resumed the guest during the rehearsal", "try again", GuestState.RUNNING_IN_OLD
            )

    async def _resume(self) -> None:
        """:raises RecoveryRequired: the guest does not run again."""
        subject = self._subject
        monitor, domain = subject.monitor, subject.domain
        deadline = time.monotonic() + _DAEMON_PATIENCE
        while subject.process.alive:
            try:
                if subject.leases:
                    await domain.resume()
                else:
                    await monitor.execute("cont", timeout=_LIBVIRT_PATIENCE)
                return
            except SevhopError as err:
                # It was not stopped, or another client has resumed it: then libvirt refuses.
                with contextlib.suppress(SevhopError):
                    if (await monitor.execute("query-status"))["running"]:
                        return
                if time.monotonic() > deadline:
                    message = f"cannot resume the guest after the rehearsal: {err.message}"
                    raise RecoveryRequired(message, f"virsh resume {subject.name}", GuestState.PAUSED_IN_OLD) from err
            await asyncio.sleep(_POLL)
            # The daemon may have been restarted: reconnect.
            with contextlib.suppress(SevhopError):
                connection = await Connection.open(self._connection.uri)
                self._resources.callback(connection.close)
                domain = await connection.domain(subject.name)
                monitor = await domain.monitor()

    def _refused(self, qemu: Destination, log_lines: list[str], error: SevhopError) -> Refused:
        versions = f"QEMU {qemu.monitor.version} cannot take this guest over from {self._subject.guest.version}"
        return Refused(f"{versions}: {_reason(log_lines) or error.message}", _ANOTHER)


async def _load_stream(incoming: IncomingState, stream: bytes, timeout: float) -> SevhopError | None:
    """Have the rehearsal QEMU load a state. :return: why it could not."""
    try:
        await incoming.write(stream)
        incoming.end()
        await incoming.loaded(timeout=timeout)
    except SevhopError as err:
        return err
    return None


def _reason(log_lines: list[str]) -> str:
    """Why QEMU could not load a state, in its own words, in one line; empty when it has printed nothing."""
    lines = [_PREFIX.sub("", line) for line in log_lines]
    reasons = list(dict.fromkeys(line for line in lines if not _CONCLUSION.match(line))) or lines
    return "; ".join(reasons[:_LINES])


def _disks(rows: list[Mapping[str, Any]]) -> dict[str, Disk]:
    """The disks that ``query-block`` reports, by the id of their device; flash by ``pflash0``, ``pflash1``."""
    found = {}
    for row in rows:
        device = _QDEV.match(row.get("qdev", ""))
        if device is None or "inserted" not in row:
            continue
        name = f"pflash{device['flash']}" if device["flash"] else device["id"] or device["name"]
        inserted = row["inserted"]
        found[name] = Disk(inserted["image"]["virtual-size"], inserted["ro"])
    return found


@contextlib.asynccontextmanager
async def _taps(networks: list[rehearsal_command_line.Network]) -> AsyncIterator[dict[str, list[int]]]:
    """Isolated taps, by the id of the backend."""
    taps: dict[str, list[int]] = {}

    async def open_one(network: rehearsal_command_line.Network) -> None:
        taps[network.name] = await asyncio.to_thread(open_tap, network.queues)

    try:
        for network in networks:
            try:
                await shielded(open_one(network))
            except SevhopError as err:
                raise Unrehearsable(err.message) from err
        yield taps
    finally:
        for group in taps.values():
            for tap in group:
                os.close(tap)


@contextlib.contextmanager
def _launch_context(source: QemuProcess, environment: Mapping[str, str]) -> Iterator[LaunchContext]:
    """The source's, but for the guest's cgroups, which a rehearsal must not be charged to. It starts as ourselves."""
    own = QemuProcess.open(os.getpid())
    try:
        stdout, stderr = (os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC) for _ in range(2))
        launch_context = LaunchContext(own.credentials, "/", dict(environment), source.limits, stdout, stderr)
    finally:
        own.close()
    try:
        yield launch_context
    finally:
        launch_context.close()
