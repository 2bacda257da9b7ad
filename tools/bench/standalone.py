"""
Methods to move a guest between two QEMU processes on one host: sevhop's hop, and QEMU's own.

==================  ================================================================================================
``hop``             ``sevhop hop``
``cpr-transfer``    QEMU's live update: memory and descriptors are handed over (QEMU 9.2 and later, on both sides)
``x-ignore-shared`` migration without the memory, which both processes map from one file
``precopy``         live migration over a UNIX socket, without a bandwidth limit
``file``            the guest stops, is saved to a file, and loaded by a QEMU that was started before
==================  ================================================================================================

Each run has a guest of its own; source and destination are the same QEMU binary. None of QEMU's methods supports SEV
guests.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qemu.qmp import EventListener
from sevhop_qmp.errors import MonitorError, SevhopError
from sevhop_qmp.monitor import Monitor

from tests.support.guests.machine import Accelerator, Machine
from tests.support.guests.running import Guest, GuestFailed, wait_until

from . import machines
from .downtime import Sampler, memory_of, touch
from .runs import Failed, Outcome, Run
from .usage import Usage, counting

#: Seconds that a migration may take; on a busy machine 8 GB take minutes to write.
_MIGRATION_TIMEOUT = 600.0
_START_TIMEOUT = 60.0
#: Bytes per second: unlimited.
_BANDWIDTH = 1 << 40
#: For memory in named files.
_SHM = Path("/dev/shm")


@dataclass(frozen=True)
class Given:
    """
    The conditions of a run.

    :ivar guest: runs, all of its memory touched.
    :ivar memory: the file of its memory.
    :ivar image: path for a save image.
    """

    guest: Guest
    emulator: Path
    memory: Path
    image: Path

    @property
    def directory(self) -> Path:
        """The directory of the guest."""
        return self.guest.machine.directory

    @property
    def monitor(self) -> Path:
        """The QMP socket of the destination."""
        return self.directory / "destination.sock"

    @contextlib.contextmanager
    def destination(self, *more: str) -> Iterator[subprocess.Popen[bytes]]:
        """A second QEMU with the source's command line, except for monitor and log. It is killed at the end."""
        machine = self.guest.machine
        argv = machine.command(self.emulator)
        for ours, theirs in ((machine.monitor, self.monitor), (machine.serial, self.directory / "destination.log")):
            argv = [argument.replace(str(ours), str(theirs)) for argument in argv]
        with open(machine.messages, "ab") as messages:
            process = subprocess.Popen([*argv, *more], stdin=subprocess.DEVNULL, stdout=messages, stderr=messages)
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    async def connect(self, path: Path) -> Monitor:
        """:raises GuestFailed: no monitor answers in time."""
        deadline = time.monotonic() + _START_TIMEOUT
        while True:
            try:
                return await Monitor.connect(path)
            except MonitorError as err:
                if time.monotonic() > deadline:
                    raise GuestFailed(str(err)) from err
                await asyncio.sleep(0.01)


def hop(given: Given) -> Outcome:
    """sevhop's own."""
    command = [sys.executable, "-m", "sevhop.cli", "hop", "--qmp", str(given.guest.machine.monitor)]
    with Sampler(given.memory) as sampler:
        sampler.wait()
        began = time.monotonic()
        done = subprocess.run(
            [*command, "--emulator", str(given.emulator), "--json"], capture_output=True, text=True, check=False
        )
        ended = time.monotonic()
        report = json.loads(done.stdout)
        if report["outcome"] != "done":
            raise GuestFailed(f"hop: {report['reason']}")
        sampler.see_growth()
        sampler.stop()
    phases = {phase["name"]: phase["ms"] for phase in report["phases"]}
    return Outcome(sampler.longest, began, ended, phases, report["downtime_ms"])


def cpr_transfer(given: Given) -> Outcome:
    """QEMU's live update."""
    stream, state = given.directory / "stream.sock", given.directory / "cpr.sock"
    cpr = {"channel-type": "cpr", "addr": _unix(state)}
    main = {"channel-type": "main", "addr": _unix(stream)}

    async def work() -> None:
        async with await given.connect(given.guest.machine.monitor) as source:
            await _events(source)
            await source.execute("migrate-set-parameters", {"mode": "cpr-transfer"})
            with source.events("MIGRATION") as events:
                # It returns when the destination has started, which takes its time.
                await source.execute("migrate", {"channels": [main, cpr]}, timeout=_START_TIMEOUT)
                await _completed(source, events)

    def migrate() -> float:
        wait_until(state.exists, _START_TIMEOUT, "the destination listens")
        asyncio.run(work())
        return time.monotonic()

    return _in_shared_memory(given, ["-incoming", f"unix:{stream}", "-incoming", json.dumps(cpr)], migrate)


def x_ignore_shared(given: Given) -> Outcome:
    """Migration without the memory."""

    def migrate() -> float:
        return asyncio.run(_migrate(given, f"unix:{given.directory / 'stream.sock'}", "x-ignore-shared"))

    return _in_shared_memory(given, ["-incoming", "defer"], migrate)


def _in_shared_memory(given: Given, incoming: list[str], migrate: Callable[[], float]) -> Outcome:
    """Both QEMUs have the same memory, so one sampler sees the whole downtime. ``migrate`` returns when it ended."""
    with Sampler(given.memory) as sampler:
        sampler.wait()
        began = time.monotonic()
        with given.destination(*incoming):
            ended = migrate()
            sampler.see_growth()
            sampler.stop()
    return Outcome(sampler.longest, began, ended)


def precopy(given: Given) -> Outcome:
    """Live migration."""
    with Sampler(given.memory) as before:
        before.wait()
        began = time.monotonic()
        with given.destination("-incoming", "defer") as process, Sampler(_memory(process.pid)) as after:
            ended = asyncio.run(_migrate(given, f"unix:{given.directory / 'stream.sock'}"))
            after.wait()
        before.stop()
    return Outcome((before.last, after.began), began, ended)


def file(given: Given) -> Outcome:
    """Stop the guest, save it to a file, load it."""

    async def save() -> None:
        async with await given.connect(given.guest.machine.monitor) as source:
            await _events(source)
            await source.execute("migrate-set-parameters", {"max-bandwidth": _BANDWIDTH})
            await source.execute("stop")
            with source.events("MIGRATION") as events:
                await source.execute("migrate", {"uri": f"file:{given.image}"})
                await _completed(source, events)

    async def restore() -> None:
        async with await given.connect(given.monitor) as destination:
            await _events(destination)
            with destination.events("MIGRATION") as events:
                await destination.execute("migrate-incoming", {"uri": f"file:{given.image}"})
                await _completed(destination, events)
            await destination.execute("cont")

    try:
        with Sampler(given.memory) as before:
            before.wait()
            began = time.monotonic()
            with given.destination("-incoming", "defer") as process, Sampler(_memory(process.pid)) as after:
                started = time.monotonic()
                asyncio.run(save())
                before.stop()
                saved = time.monotonic()
                asyncio.run(restore())
                ended = time.monotonic()
                after.wait()
    finally:
        # Writing this image to the disk must not disturb the next run.
        given.image.unlink(missing_ok=True)
        os.sync()
    phases = {"save": (saved - started) * 1e3, "restore": (ended - saved) * 1e3}
    return Outcome((before.last, after.began), began, ended, phases)


async def _migrate(given: Given, uri: str, capability: str | None = None) -> float:
    """Migrate to a destination that waits for it. :return: when the source reported the end."""
    async with (
        await given.connect(given.guest.machine.monitor) as source,
        await given.connect(given.monitor) as destination,
    ):
        for monitor in (source, destination):
            await _events(monitor, capability)
        await source.execute("migrate-set-parameters", {"max-bandwidth": _BANDWIDTH})
        await destination.execute("migrate-incoming", {"uri": uri})
        with source.events("MIGRATION") as events:
            await source.execute("migrate", {"uri": uri})
            await _completed(source, events)
            return time.monotonic()


async def _events(monitor: Monitor, *more: str | None) -> None:
    wanted = [{"capability": name, "state": True} for name in ("events", *more) if name]
    await monitor.execute("migrate-set-capabilities", {"capabilities": wanted})


async def _completed(monitor: Monitor, events: EventListener) -> None:
    while True:
        event = await monitor.next_event(events, timeout=_MIGRATION_TIMEOUT)
        status = event["data"]["status"]  # type: ignore[index]
        if status == "completed":
            return
        if status == "failed":
            reason = (await monitor.execute("query-migrate")).get("error-desc", "")
            raise GuestFailed(f"the migration failed: {reason}")


def _unix(path: Path) -> dict[str, str]:
    return {"transport": "socket", "type": "unix", "path": str(path)}


def _memory(pid: int) -> Path:
    wait_until(lambda: memory_of(pid) is not None, _START_TIMEOUT, "the destination has memory")
    memory = memory_of(pid)
    assert memory is not None
    return memory


#: In the order in which they alternate.
MODES: dict[str, Callable[[Given], Outcome]] = {
    "hop": hop,
    "cpr-transfer": cpr_transfer,
    "x-ignore-shared": x_ignore_shared,
    "precopy": precopy,
    "file": file,
}
#: Methods with a much longer downtime: a few runs are enough, and each takes long. They have separate rounds, one for
#: so many of the others, since they fill page cache and disk and would slow down the run after them.
SLOW, SELDOM = ("precopy", "file"), 3


def _for(mode: str, machine: Machine, memory: Path) -> Machine:
    """The machine with the kind of memory that a mode needs."""
    if mode == "cpr-transfer":
        return dataclasses.replace(machine, more=("-machine", "aux-ram-share=on"))
    if mode == "x-ignore-shared":
        # Only memory in a named file is not in the migration.
        backend = f"memory-backend-file,id=memory,size={machine.memory_mib}M,share=on,mem-path={memory}"
        more = ("-object", backend, "-machine", "memory-backend=memory")
        return dataclasses.replace(machine, memory="private", more=more)
    return machine


@dataclass(frozen=True)
class Standalone:
    """
    Measures guests between two processes of one emulator.

    :ivar scratch: directory of the guests' files.
    :ivar images: directory of the save images; on a disk, as usual.
    :ivar usage: counts processor time and memory; None where that is not possible.
    """

    emulator: Path
    accelerator: Accelerator
    scratch: Path
    images: Path
    usage: Usage | None = None

    def measure(self, kind: str, memory_mib: int, rounds: int, modes: Sequence[str]) -> Iterator[Run | Failed]:
        """All runs with one kind of machine and one size of memory; a round has one run of each mode."""
        fast, slow = [mode for mode in modes if mode not in SLOW], [mode for mode in modes if mode in SLOW]
        for mode in fast * rounds + slow * -(-rounds // SELDOM):
            try:
                yield self.run(mode, kind, memory_mib)
            except (GuestFailed, SevhopError) as err:
                yield Failed(mode, kind, memory_mib, str(err))

    def run(self, mode: str, kind: str, memory_mib: int) -> Run:
        """
        Replace the QEMU once.

        :raises GuestFailed: the guest did not arrive.
        """
        with contextlib.ExitStack() as resources:
            # Short names: the path of a socket has a length limit.
            directory = Path(resources.enter_context(tempfile.TemporaryDirectory(dir=self.scratch)))
            plain = machines.standalone(kind, directory, self.accelerator, memory_mib)
            shm = resources.enter_context(tempfile.TemporaryDirectory(prefix="sevhop-bench-", dir=_SHM))
            machine = _for(mode, plain, Path(shm, "memory"))
            guest = resources.enter_context(Guest.start(machine, self.emulator))
            guest.wait_for_ticks(3)
            version = ".".join(str(guest.execute("query-version")["qemu"][part]) for part in _VERSION)
            memory = memory_of(guest.pid) or Path(shm, "memory")
            touch(memory)
            try:
                given = Given(guest, self.emulator, memory, self.images / "standalone.save")
                with counting(self.usage) as used:
                    outcome = MODES[mode](given)
            except (GuestFailed, SevhopError) as err:
                raise GuestFailed(f"{err}; QEMU said {guest.said()[-500:]!r}") from err
        return Run.of((mode, kind, memory_mib), outcome, used, version, version)


_VERSION = ("major", "minor", "micro")
