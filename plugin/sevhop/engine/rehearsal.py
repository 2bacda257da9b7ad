"""
The rehearsal: the new emulator loads a trial copy of the device state, before the guest is touched for real.

A trial is a QEMU with the domain's own devices beside the running guest. It sees the guest's memory privately, has
disks without content and a network of its own (:mod:`sevhop.engine.rehearsal_command_line`), and never runs. ::

    while the guest runs     the trial is started, and waits for a device state
    in a pause               the source's state is saved, the trial loads it
    while the guest runs     the trial is ended

That loading is part of the pause, too, has a reason: a virtio device compares what it loads with its rings in the
guest's memory, which must stand still meanwhile. The pause is made by plain ``stop`` and ``cont``, which libvirt
sees as events; with its own suspend and resume it would take the guest's network down and up. It is bounded, and it
ends whatever happens but SIGKILL. A guest that is paused already stays so. What cannot be told: a ``virsh suspend`` of
somebody else in those milliseconds finds the guest paused, and libvirt does nothing that we could see.

With a lock manager (lockd, sanlock) that is different: libvirt gives up a domain's leases when it sees the stop, and
takes them again only in its own resume. So it is asked to suspend and resume then.

Two versions that cannot load each other's state are refused here, in QEMU's own words, and so is a trial that is not
the same machine. What cannot exist twice at all cannot be rehearsed, which is noted
(:exc:`.trial_command_line.Unrehearsable`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sevhop_qmp import adopt, ram_blocks
from sevhop_qmp.device_state import IncomingState
from sevhop_qmp.errors import SevhopError, StateError
from sevhop_qmp.kept_state import KeptState
from sevhop_qmp.monitor import COMMAND_TIMEOUT, Commands
from sevhop_qmp.process import QemuProcess

from ..cancellation import shielded
from ..disks import present_disks
from ..errors import NeedsRecover, Refused
from ..events import GuestRuns, GuestStopped, Listener, ignore
from ..guest import cpu_features, emulator, inspection
from ..keeper.handover import Held, Keeper
from ..libvirt import domain_xml
from ..libvirt.connection import Connection, Domain
from . import rehearsal_command_line
from .destination import START_TIMEOUT, Destination, Surroundings
from .isolated_tap import open_tap
from .rehearsal_command_line import Backend, Cards, Disk, Unrehearsable

log = logging.getLogger(__name__)

#: The longest pause, as a part of what a step may take: 3 s with the default.
_PART_OF_STEP = 0.3
#: Seconds for ``stop`` and ``cont``: more than libvirt waits for its own jobs of the domain, so that one of the two
#: that was given up is not carried out behind our back.
_LIBVIRT_PATIENCE = 40.0
#: Seconds for which a daemon that does not answer is asked again to continue the guest, and between two attempts.
_DAEMON_PATIENCE = 30.0
_POLL = 0.1
#: Seconds in which a trial that has failed ends.
_LAST_WORDS = 2.0
_NO_TRIAL = "sevhop upgrade --no-rehearsal goes without the trial"
_ANOTHER = "choose another version of QEMU"
#: What starts a trial where the source's files are.
_PROGRAMS = ("nsenter", "unshare", "setpriv")
_QDEV = re.compile(r"/machine/peripheral/(?P<id>[^/]+)|/machine/system\.flash(?P<flash>[01])$|(?P<name>[^/]+)$")
_PREFIX = re.compile(r"^[^ ]*qemu[^ :]*: ")
#: A backend in what ``info network`` prints, once for each of its queues.
_BACKEND = re.compile(r"^ \\ (?P<name>[^:]+): index=(?P<index>\d+),type=(?P<kind>[^,\r\n]+)", re.MULTILINE)
_CONCLUSION = re.compile(r"load of migration failed")
#: Lines of QEMU that make up a reason.
_LINES = 3


@dataclass(frozen=True)
class Subject:
    """
    What is rehearsed.

    :ivar xml: the domain as it runs.
    :ivar emulator: the QEMU to go to.
    :ivar encrypted: names of RAM blocks whose content cannot be carried.
    :ivar directory: for the trial, to be made, where it goes away should we be killed.
    :ivar domain: as libvirt knows it.
    :ivar leases: whether libvirt holds leases for it while it runs.
    :ivar stopped: told before it is stopped, and when it has been continued.
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


class Rehearsal:
    """
    The rehearsal of one upgrade. :meth:`run` it once.

    :ivar pause_ms: milliseconds for which the guest was stopped; None while it was not.
    """

    def __init__(
        self,
        connection: Connection,
        subject: Subject,
        step_timeout: float = COMMAND_TIMEOUT,
        listener: Listener = ignore,
    ) -> None:
        self.pause_ms: float | None = None
        self._connection = connection
        self._subject = subject
        self._step_timeout = step_timeout
        self._tell = listener
        self._resources = contextlib.AsyncExitStack()

    async def run(self) -> str:
        """
        Rehearse. Afterwards the guest is in the state that it was in.

        :return: what the new emulator has more than the old one, which is no reason to refuse it.
        :raises Refused: the new emulator does not start, or cannot load the state.
        :raises Unrehearsable: this guest cannot be rehearsed; that says nothing of the upgrade.
        :raises NeedsRecover: the guest could not be continued.
        :raises SevhopError: the source does not play along.
        """
        async with self._resources:
            state = await self._resources.enter_async_context(
                KeptState(self._subject.monitor, self._subject.guest.machine_type)
            )
            trial = await self._start()
            incoming = self._resources.enter_context(IncomingState(trial.monitor))
            try:
                await incoming.arm()
                gained = await self._compare(trial)
            except SevhopError as err:
                raise self._refused(trial, [], err) from err
            await state.arm()
            await self._load(state, trial, incoming)
            return gained

    # -- while the guest runs ------------------------------------------------------------------------

    async def _start(self) -> Destination:
        subject = self._subject
        if missing := [program for program in _PROGRAMS if shutil.which(program) is None]:
            raise Refused(f"a rehearsal needs {', '.join(missing)}, which is not installed", _NO_TRIAL)
        xml = domain_xml.with_emulator(domain_xml.without_interfaces(subject.xml), subject.emulator)
        try:
            environment, (emulator, *arguments) = await self._connection.command_line(xml)
        except SevhopError as err:
            hint = err.hint or _ANOTHER
            raise Refused(f"libvirt cannot start it in {subject.emulator}: {err.message}", hint) from err
        disks = _disks(await subject.monitor.execute("query-block"))
        cards = await _cards(subject.monitor, subject.process.command_line[1:], subject.emulator)
        derived = rehearsal_command_line.derive(arguments, subject.process.command_line[1:], disks, cards)
        taps = await self._resources.enter_async_context(_taps(derived.networks))
        for network in derived.networks:
            numbers = [str(tap) for tap in taps[network.name]]
            key = "fd" if len(numbers) == 1 else "fds"
            derived.arguments[:0] = ["-netdev", f"tap,id={network.name},{key}={':'.join(numbers)},vhost=off"]
        held = Held.take_machine(subject.process, subject.guest.blocks.values())
        self._resources.callback(held.close)
        keeper = self._resources.enter_context(Keeper(held, subject.guest.context))
        with _surroundings(subject.process, environment) as surroundings:
            try:
                trial = await Destination.start(
                    emulator,
                    derived.arguments,
                    surroundings,
                    keeper,
                    timeout=max(START_TIMEOUT, self._step_timeout),
                    command_timeout=self._step_timeout,
                    directory=subject.directory,
                    within=_elsewhere(subject.process),
                    keep=[tap for group in taps.values() for tap in group],
                )
            except SevhopError as err:
                raise Refused(f"{subject.emulator} does not start with this domain: {err.message}", _ANOTHER) from err
        self._resources.push_async_callback(trial.kill)
        return trial

    async def _compare(self, trial: Destination) -> str:
        """
        See that it is the same machine: with fewer devices it would fail for no reason, or succeed for none.

        :return: what its processors can do that those of the source cannot.
        """
        subject = self._subject
        status = await adopt.adopt_status(trial.monitor)
        if status.ram != "private":
            raise SevhopError(f"it has not adopted the guest's memory (it is {status.ram})")
        theirs = await inspection.inspect(trial.monitor, trial.process)
        if found := inspection.differences(subject.guest, theirs):
            raise SevhopError("; ".join(found))
        # As it will be done when the hop commits.
        ram_blocks.not_shared(subject.guest.blocks, theirs.blocks, encrypted=subject.encrypted)
        words = await cpu_features.words(subject.monitor)
        lost, gained = await cpu_features.compare(subject.monitor, words, trial.monitor)
        if lost:
            raise SevhopError(lost)
        return gained

    # -- in the pause ----------------------------------------------------------------------------------

    async def _load(self, state: KeptState, trial: Destination, incoming: IncomingState) -> None:
        heard = len(trial.said())
        limit = self._step_timeout * _PART_OF_STEP
        failure: SevhopError | None = None
        async with self._pause():
            try:
                async with asyncio.timeout(limit):
                    stream = await state.save(release_images=False, timeout=limit)
                    failure = await _fed(incoming, stream, limit)
            except TimeoutError:
                failure = StateError(f"it has not loaded the device state within {limit:g} s")
        if failure is not None:
            # QEMU tells why on its way out.
            await trial.process.wait(_LAST_WORDS)
            raise self._refused(trial, trial.said()[heard:], failure) from failure

    @contextlib.asynccontextmanager
    async def _pause(self) -> AsyncIterator[None]:
        """
        Stop the guest, and let it go on whatever happens.

        :raises Refused: somebody else has continued it meanwhile, so the trial proves nothing.
        :raises NeedsRecover: it cannot be continued.
        """
        monitor = self._subject.monitor
        stops = (await monitor.execute("query-status"))["running"]
        if stops:
            self._tell(GuestStopped(self._subject.name))
        began = time.monotonic()
        try:
            if stops:
                log.info("%s: pause", self._subject.name)
                self._subject.stopped(True)
                # To its end, so that it cannot come behind what continues the guest.
                if self._subject.leases:
                    await shielded(self._subject.domain.suspend())
                else:
                    await shielded(monitor.execute("stop", timeout=_LIBVIRT_PATIENCE))
            yield
            intact = not (await monitor.execute("query-status"))["running"]
        finally:
            if stops:
                await shielded(self._continue())
                self._subject.stopped(False)
                self.pause_ms = (time.monotonic() - began) * 1e3
                self._tell(GuestRuns(self._subject.name, self.pause_ms))
        if not intact:
            raise Refused("somebody else continued the guest in the middle of the rehearsal", "try again")

    async def _continue(self) -> None:
        """:raises NeedsRecover: it does not go on."""
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
                if time.monotonic() > deadline:
                    message = f"the guest cannot be continued after the rehearsal: {err.message}"
                    raise NeedsRecover(message, f"virsh resume {subject.name}") from err
            await asyncio.sleep(_POLL)
            # The daemon may have been restarted, and another connection is needed.
            with contextlib.suppress(SevhopError):
                connection = await Connection.open(self._connection.uri)
                self._resources.callback(connection.close)
                domain = await connection.domain(subject.name)
                monitor = await domain.monitor()

    def _refused(self, trial: Destination, said: list[str], error: SevhopError) -> Refused:
        versions = f"QEMU {trial.monitor.version} cannot take this guest over from {self._subject.guest.version}"
        return Refused(f"{versions}: {_reason(said) or error.message}", _ANOTHER)


async def _fed(incoming: IncomingState, stream: bytes, timeout: float) -> SevhopError | None:
    """Have the trial load a state. :return: why it could not."""
    try:
        await incoming.write(stream)
        incoming.end()
        await incoming.loaded(timeout=timeout)
    except SevhopError as err:
        return err
    return None


def _reason(said: list[str]) -> str:
    """Why QEMU could not load a state, in its own words, in one line; empty when it said nothing."""
    lines = [_PREFIX.sub("", line) for line in said]
    told = list(dict.fromkeys(line for line in lines if not _CONCLUSION.match(line))) or lines
    return "; ".join(told[:_LINES])


def _disks(rows: list[Mapping[str, Any]]) -> dict[str, Disk]:
    """The disks that ``query-block`` tells of, by the id of their device; flash by ``pflash0``, ``pflash1``."""
    found = {}
    for row in rows:
        device = _QDEV.match(row.get("qdev", ""))
        if device is None or "inserted" not in row:
            continue
        name = f"pflash{device['flash']}" if device["flash"] else device["id"] or device["name"]
        inserted = row["inserted"]
        found[name] = Disk(inserted["image"]["virtual-size"], inserted["ro"])
    return found


async def _cards(monitor: Commands, arguments: Sequence[str], program: str) -> Cards:
    """:raises SevhopError: QEMU does not answer."""
    present = await present_disks.devices(monitor)
    plugged = await present_disks.plugged(monitor, arguments, present, present_disks.CARDS)
    backends: dict[str, Backend] = {}
    if plugged:
        drivers = {str(card["driver"]) for card in plugged}
        known = await asyncio.to_thread(emulator.properties, program, drivers)
        plugged = present_disks.without_unknown(plugged, known)
        text = await monitor.execute("human-monitor-command", {"command-line": "info network"})
        for found in _BACKEND.finditer(str(text)):
            backends[found["name"]] = Backend(found["kind"], int(found["index"]) + 1)
    return Cards(frozenset(device.name for device in present.values() if not device.plugged), plugged, backends)


@contextlib.asynccontextmanager
async def _taps(networks: list[rehearsal_command_line.Network]) -> AsyncIterator[dict[str, list[int]]]:
    """Taps in networks of their own, by the id of the backend."""
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
def _surroundings(source: QemuProcess, environment: Mapping[str, str]) -> Iterator[Surroundings]:
    """The source's, but for the guest's cgroups, in which a trial would be counted. It starts as ourselves."""
    own = QemuProcess.open(os.getpid())
    try:
        stdout, stderr = (os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC) for _ in range(2))
        surroundings = Surroundings(own.credentials, "/", dict(environment), source.limits, stdout, stderr)
    finally:
        own.close()
    try:
        yield surroundings
    finally:
        surroundings.close()


def _elsewhere(source: QemuProcess) -> list[str]:
    """
    What executes a trial where the source's files are, without a network, as the source's user. It ends with us.

    ``/dev`` is the domain's own under libvirt, with those devices in it that this user may use.
    """
    identity = source.credentials
    groups = f"--groups={','.join(map(str, identity.groups))}" if identity.groups else "--clear-groups"
    return [
        *("nsenter", f"--mount=/proc/{source.pid}/ns/mnt", "--"),
        *("unshare", "--net", "--"),
        *("setpriv", f"--reuid={identity.uid}", f"--regid={identity.gid}", groups, "--pdeathsig=KILL", "--"),
    ]
