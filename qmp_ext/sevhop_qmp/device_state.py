"""
The device state, on its way from source to destination.

The source writes it by ``xen-save-devices-state``, which exists in every build, looks at no migration blocker and,
with ``live`` on a stopped VM, also gives up its disk images. The destination loads it as an incoming migration. In
between two things are missing from the stream, and this module puts them in: the configuration section after the
8 byte header, and an empty description at the end (migration/savevm.c: ``qemu_savevm_state_header``,
``QEMU_VM_CONFIGURATION``, ``QEMU_VM_VMDESCRIPTION``).

Nothing is stored on disk: the stream goes through two pipes while it is being written.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import struct
from io import FileIO
from typing import Any, Self

from qemu.qmp import EventListener

from .errors import CommandError, MonitorError, StateError
from .monitor import Monitor

MAGIC = b"QEVM\x00\x00\x00\x03"
_CONFIGURATION = 0x07
_DESCRIPTION = 0x06
_STREAM_NAME = "sevhop-device-state"
_PIPE_SIZE = 1 << 20

#: Seconds that saving or loading may take.
STATE_TIMEOUT = 10.0


def configuration_section(machine_type: str) -> bytes:
    """
    The section that tells the destination which machine type the stream is for.

    :raises StateError: there is no such machine type.
    """
    try:
        name = machine_type.encode("ascii")
    except UnicodeEncodeError as err:
        raise StateError(f"{machine_type!a} is no machine type") from err
    return struct.pack(">BI", _CONFIGURATION, len(name)) + name


#: An empty JSON description; QEMU expects one unless the machine has suppress-vmdesc=on.
EMPTY_DESCRIPTION = struct.pack(">BI", _DESCRIPTION, 0)


class IncomingState:
    """
    The destination's side: it is told to listen, given the stream, and waited for.

    :ivar image: the stream so far, for whoever has to load it once more into another destination.
    """

    def __init__(self, destination: Monitor) -> None:
        self._destination = destination
        self._exit = contextlib.ExitStack()
        self._pipe: FileIO | None = None
        self._migration: EventListener | None = None
        self.image = bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    async def arm(self) -> None:
        """
        Let the destination listen.

        :raises CommandError: it is not in a state to do so.
        :raises MonitorError: it is gone or silent.
        """
        read_end, self._pipe = _pipe(self._exit)
        capabilities = [
            {"capability": "events", "state": True},
            # The images stay closed until the guest runs; otherwise the source could not take them back.
            {"capability": "late-block-activate", "state": True},
        ]
        await self._destination.execute("migrate-set-capabilities", {"capabilities": capabilities})
        self._migration = self._exit.enter_context(self._destination.events("MIGRATION"))
        await self._destination.send_fd(_STREAM_NAME, read_end.fileno())
        read_end.close()
        await self._destination.execute("migrate-incoming", {"uri": f"fd:{_STREAM_NAME}"})

    async def write(self, data: bytes) -> None:
        """
        Give it the next part of the stream.

        :raises StateError: it does not read any more.
        """
        assert self._pipe is not None
        self.image += data
        rest = memoryview(data)
        while rest:
            try:
                count: int | None = self._pipe.write(rest)
            except BrokenPipeError as err:
                raise StateError("the destination stopped reading the device state") from err
            if count is None:
                await _until_ready(self._pipe, write=True)
                continue
            rest = rest[count:]

    def end(self) -> None:
        """That was all."""
        assert self._pipe is not None
        self._pipe.close()

    async def loaded(self, *, timeout: float = STATE_TIMEOUT) -> None:
        """
        Wait until the destination has loaded it all.

        :raises StateError: it could not; QEMU's reason is in its log more often than in the message.
        :raises MonitorError: the destination ended, which is how QEMU usually reports a state it cannot load.
        """
        assert self._migration is not None
        while True:
            event = await self._destination.next_event(self._migration, timeout=timeout)
            data = event["data"]
            status = data["status"] if isinstance(data, dict) else None
            if status == "completed":
                return
            if status == "failed":
                info = await self._destination.execute("query-migrate")
                reason = info.get("error-desc", "no reason given")
                raise StateError(f"the destination cannot load the device state: {reason}")


class OutgoingState:
    """
    The source's side, connected to a destination's: everything is armed while the guest runs. :meth:`begin` is called
    with the order to stop it, and :meth:`pass_on` once it has stopped.
    """

    def __init__(self, source: Monitor, incoming: IncomingState, machine_type: str) -> None:
        self._source = source
        self._incoming = incoming
        self._configuration = configuration_section(machine_type)
        self._exit = contextlib.AsyncExitStack()
        self._pipe: FileIO | None = None
        self._path = ""
        self._saving: asyncio.Task[Any] | None = None
        self._forwarding: asyncio.Task[None] | None = None
        self._wanted = asyncio.Event()
        self._saved = asyncio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await _cancel(self._forwarding)
        await _cancel(self._saving)
        await self._exit.aclose()

    async def arm(self, uid: int, gid: int) -> None:
        """
        Give the source a pipe to write to.

        :param uid: user (and group) that the source runs as, who must be able to open the pipe.
        :raises CommandError, MonitorError: it does not play along.
        """
        self._pipe, write_end = _pipe(self._exit)
        # The source opens the pipe anew through /proc, which asks for the permissions of its inode.
        if (uid, gid) != (os.getuid(), os.getgid()):
            os.fchown(write_end.fileno(), uid, gid)
        fdset, number = await self._source.add_fd(write_end.fileno())
        self._exit.push_async_callback(self._remove_fdset, fdset)
        write_end.close()
        self._path = f"/proc/self/fd/{number}"

    async def _remove_fdset(self, fdset: int) -> None:
        with contextlib.suppress(MonitorError, CommandError):
            await self._source.execute("remove-fd", {"fdset-id": fdset})

    def begin(self, *, timeout: float = STATE_TIMEOUT) -> None:
        """
        Order the source to save its state, and do not wait for it. The order is behind everything that the source was
        told before, and there is room for the whole state, so it may be given together with the one to stop.

        :param timeout: seconds until the source must have done it.
        """
        arguments = {"filename": self._path, "live": True}
        self._saving = asyncio.ensure_future(self._source.execute("xen-save-devices-state", arguments, timeout=timeout))
        self._forwarding = asyncio.ensure_future(self._forward())

    async def pass_on(self, *, timeout: float = STATE_TIMEOUT) -> None:
        """
        Complete what the source writes and give it to the destination. Afterwards the source has given up its disk
        images; ``cont`` takes them back.

        :raises StateError: the source could not save, or what it wrote is not a device state.
        :raises MonitorError: the source is gone or silent.
        """
        assert self._saving is not None
        assert self._forwarding is not None
        self._wanted.set()
        try:
            await asyncio.wait({self._forwarding, self._saving}, return_when=asyncio.FIRST_COMPLETED)
            if self._forwarding.done():
                self._forwarding.result()
            await self._saving
            self._saved.set()
            async with asyncio.timeout(timeout):
                await self._forwarding
        except CommandError as err:
            raise StateError(f"the source cannot save its device state: {err.desc}") from err
        except TimeoutError as err:
            raise StateError(f"the destination did not take the device state within {timeout:g} s") from err
        finally:
            await _cancel(self._forwarding)

    async def abandon(self) -> None:
        """Nobody wants the state any more. Afterwards the source has done with it, one way or the other."""
        if self._saving is None:
            return
        assert self._pipe is not None
        await _cancel(self._forwarding)
        # Were the source waiting for room, it would wait for ever, and do nothing else that it is told.
        self._pipe.close()
        await asyncio.gather(self._saving, return_exceptions=True)

    async def _forward(self) -> None:
        """Pass the stream on, completed."""
        head = b""
        while len(head) < len(MAGIC):
            piece = await self._read(len(MAGIC) - len(head))
            if not piece:
                raise StateError("the source wrote no device state")
            head += piece
        if head != MAGIC:
            raise StateError(f"the source wrote no device state, its stream begins with {head.hex()}")
        data = await self._read(_PIPE_SIZE)
        await self._wanted.wait()
        await self._incoming.write(head + self._configuration + data)
        while data := await self._read(_PIPE_SIZE):
            await self._incoming.write(data)
        await self._incoming.write(EMPTY_DESCRIPTION)
        self._incoming.end()

    async def _read(self, count: int) -> bytes:
        """
        Read what there is. The source's fd set keeps the pipe open, so its end is not told by end of file: it is
        reached when QEMU has answered the command and the pipe is empty.
        """
        assert self._pipe is not None
        while True:
            finished = self._saved.is_set()
            data: bytes | None = self._pipe.read(count)
            if data is not None:
                return data
            if finished:
                return b""
            await _until_ready(self._pipe, write=False, unless=self._saved)


def _pipe(exit_stack: contextlib.ExitStack | contextlib.AsyncExitStack) -> tuple[FileIO, FileIO]:
    """A pipe whose ends do not block; the stack closes what is still open in the end."""
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    ends = FileIO(read_fd, "rb"), FileIO(write_fd, "wb")
    for end in ends:
        exit_stack.callback(end.close)
    # Room for the whole state means that neither side waits for the other. Less is slower, not wrong.
    with contextlib.suppress(OSError):
        fcntl.fcntl(read_fd, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
    return ends


async def _cancel(task: asyncio.Task[Any] | None) -> None:
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _until_ready(file: FileIO, *, write: bool, unless: asyncio.Event | None = None) -> None:
    """Wait until a pipe can be read (or written), or until an event is set."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    add, remove = (loop.add_writer, loop.remove_writer) if write else (loop.add_reader, loop.remove_reader)
    add(file.fileno(), ready.set)
    waits = [asyncio.ensure_future(event.wait()) for event in (ready, unless) if event is not None]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        remove(file.fileno())
        for wait in waits:
            wait.cancel()
