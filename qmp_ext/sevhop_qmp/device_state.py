"""
The device state, on its way from source to destination.

The source writes it by ``xen-save-devices-state``, which exists in every build, ignores migration blockers and,
with ``live`` on a stopped VM, also gives up its disk images. The destination loads it as an incoming migration. Two
things are missing in the stream, and this module inserts them: the configuration section after the
8 byte header, and an empty description at the end (migration/savevm.c: ``qemu_savevm_state_header``,
``QEMU_VM_CONFIGURATION``, ``QEMU_VM_VMDESCRIPTION``). What comes between is sections of devices, each with a
``QEMU_VM_SECTION_FULL`` in front.

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

from . import adopt, selinux
from .errors import CommandError, MonitorError, StateError
from .monitor import Commands, Monitor

MAGIC = b"QEVM\x00\x00\x00\x03"
_SECTION = b"\x04"
_CONFIGURATION = 0x07
_DESCRIPTION = 0x06
_STREAM_NAME = "sevhop-device-state"
_PIPE_SIZE = 1 << 20

#: Seconds that saving or loading may take.
STATE_TIMEOUT = 10.0


def configuration_section(machine_type: str) -> bytes:
    """
    The section with the machine type of the stream.

    :raises StateError: there is no such machine type.
    """
    try:
        name = machine_type.encode("ascii")
    except UnicodeEncodeError as err:
        raise StateError(f"cannot write a device state: {machine_type!a} is no machine type") from err
    return struct.pack(">BI", _CONFIGURATION, len(name)) + name


def header(machine_type: str) -> bytes:
    """
    The beginning of a stream, which does not depend on the state of the guest.

    :raises StateError: there is no such machine type.
    """
    return MAGIC + configuration_section(machine_type)


def cannot_save(refusal: CommandError) -> StateError:
    """The error for a source that refuses."""
    return StateError(
        f"cannot save the device state of the old QEMU: {refusal.desc}", "remove what blocks its migration"
    )


def no_state(written: bytes | bytearray) -> StateError:
    """The error for a stream that does not begin as every device state does, with :data:`MAGIC`."""
    found = f", its stream begins with {written[: len(_BEGINNING)].hex()}" if written else ""
    return StateError(f"cannot save the device state: the old QEMU wrote none{found}", "try again, and report this")


_BEGINNING = MAGIC + _SECTION
_OTHER_VERSION = "try another version of QEMU"
#: An empty JSON description; QEMU expects one unless the machine has suppress-vmdesc=on.
EMPTY_DESCRIPTION = struct.pack(">BI", _DESCRIPTION, 0)


class IncomingState:
    """
    The destination's side: :meth:`arm` it, :meth:`feed` the stream, and wait until it is :meth:`loaded`.

    :ivar image: the stream so far, without its header, to be loaded again into another destination.
    """

    def __init__(self, destination: Monitor) -> None:
        self._destination = destination
        self._exit = contextlib.ExitStack()
        self._pipe: FileIO | None = None
        self._migration: EventListener | None = None
        self._pending = bytearray()
        self._drained = asyncio.Event()
        self._broken = False
        self.image = bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_writing()
        self._exit.close()

    async def arm(self, header: bytes = b"") -> None:
        """
        Have the destination wait for the stream.

        :param header: of the stream, fed at once. The destination maps the guest's own pages when it gets the first
            byte after that; see :func:`.adopt.adopt_ram`. Without a header, it does not map them.
        :raises CommandError: it is not in a state to do so.
        :raises MonitorError: it has exited, or does not answer.
        """
        read_end, self._pipe = _pipe(self._exit)
        os.set_blocking(self._pipe.fileno(), False)
        if header:
            await self._destination.send_fd(_STREAM_NAME, read_end.fileno())
            await adopt.adopt_ram(self._destination, _STREAM_NAME, len(header))
        await self._set_capabilities()
        await self._destination.send_fd(_STREAM_NAME, read_end.fileno())
        read_end.close()
        await self._destination.execute("migrate-incoming", {"uri": f"fd:{_STREAM_NAME}"})
        if header:
            await self.write(header)
            self.image.clear()

    async def arm_restored(self, reader: int, writer: FileIO, header: bytes, *, given: bool = False) -> None:
        """
        The same for a destination that another client (libvirt) has wait for the stream, in a pipe that adopt.so has
        put in the place of that client's file.

        :param reader: the reading end of the pipe, which stays the caller's.
        :param writer: the other one, non-blocking; closed in the end.
        :param given: the header was fed before, by a process that has exited since.
        """
        self._pipe = writer
        self._exit.callback(writer.close)
        if given:
            self._migration = self._exit.enter_context(self._destination.events("MIGRATION"))
            return
        await self._destination.send_fd(_STREAM_NAME, reader)
        await adopt.adopt_ram(self._destination, _STREAM_NAME, len(header))
        await self._set_capabilities()
        await self.write(header)
        self.image.clear()

    async def announce(self, *, timeout: float = STATE_TIMEOUT) -> adopt.Announcement:
        """
        Wait until the destination has read the header, and have it announce the guest; see :func:`.adopt.announce`.

        :raises StateError: it does not read the stream in time.
        :raises CommandError, MonitorError: it refuses, has exited, or does not answer.
        """
        assert self._migration is not None
        try:
            async with asyncio.timeout(timeout):
                while (await self._destination.execute("query-migrate")).get("status") != "active":
                    await self._destination.next_event(self._migration, timeout=timeout)
        except TimeoutError as err:
            raise StateError(f"the new QEMU does not read its device state within {timeout:g} s") from err
        result = await adopt.announce(self._destination)
        self._migration.clear()  # the announced end among them
        return result

    async def _set_capabilities(self) -> None:
        capabilities = [
            {"capability": "events", "state": True},
            # The images stay inactive until the guest runs; otherwise the source could not activate them again.
            {"capability": "late-block-activate", "state": True},
        ]
        await self._destination.execute("migrate-set-capabilities", {"capabilities": capabilities})
        self._migration = self._exit.enter_context(self._destination.events("MIGRATION"))

    def feed(self, data: bytes) -> None:
        """Feed the next part of the stream. What does not fit into the pipe is written by the event loop."""
        self.image += data
        self._pending += data
        self._drained.clear()
        self._write()

    async def drained(self) -> None:
        """
        Wait until all that was fed is in the pipe.

        :raises StateError: the destination does not read any more.
        """
        await self._drained.wait()
        if self._broken:
            raise StateError("cannot load the device state into the new QEMU: it stopped reading")

    async def write(self, data: bytes) -> None:
        """Feed the next part of the stream, and wait until it is :meth:`drained`."""
        self.feed(data)
        await self.drained()

    def _write(self) -> None:
        assert self._pipe is not None
        self._stop_writing()
        try:
            count: int | None = self._pipe.write(self._pending)
        except BrokenPipeError:
            self._broken = True
            count = len(self._pending)
        del self._pending[: count or 0]
        if self._pending:
            asyncio.get_running_loop().add_writer(self._pipe, self._write)
        else:
            self._drained.set()

    def _stop_writing(self) -> None:
        if self._pipe is not None and not self._pipe.closed:
            asyncio.get_running_loop().remove_writer(self._pipe)

    def end(self) -> None:
        """End the stream."""
        assert self._pipe is not None
        self._pipe.close()

    async def loaded(self, *, timeout: float = STATE_TIMEOUT) -> None:
        """
        Wait until the destination has loaded it all.

        :raises StateError: it could not; QEMU's reason is in its log more often than in the message.
        :raises MonitorError: the destination exited, as QEMU usually does when it cannot load a state.
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
                raise StateError(f"cannot load the device state into the new QEMU: {reason}", _OTHER_VERSION)


class OutgoingState:
    """
    The source's side, connected to a destination's: everything is armed while the guest runs. :meth:`begin` is called
    with the order to stop it, :meth:`send_first_byte` and :meth:`forward` once it has stopped, and :meth:`end` when the
    destination may have everything.
    """

    def __init__(self, source: Commands, incoming: IncomingState) -> None:
        self._source = source
        self._incoming = incoming
        self._exit = contextlib.AsyncExitStack()
        self._pipe: FileIO | None = None
        self._path = ""
        self._saving: asyncio.Task[Any] | None = None
        self._received = bytearray()
        self._begun = False
        self._forwarding = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop_receiving()
        if self._saving is not None:
            self._saving.cancel()
            await asyncio.gather(self._saving, return_exceptions=True)
        await self._exit.aclose()

    async def arm(self, uid: int, gid: int) -> None:
        """
        Give the source a pipe to write to.

        :param uid: user (and group) that the source runs as; it must be able to open the pipe.
        :raises CommandError, MonitorError: it refuses, or does not answer.
        """
        self._pipe, write_end = _pipe(self._exit)
        os.set_blocking(self._pipe.fileno(), False)
        # As /dev/fdset/N the source would truncate it, which pipes do not allow. It opens the pipe again through /proc,
        # which checks the permissions of its inode.
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
        Order the source to save its state, and do not wait for it. Commands are executed in their order, and the pipe
        has room for the whole state, so this may be sent together with ``stop``.

        :param timeout: seconds in which the source must have saved.
        """
        assert self._pipe is not None
        # No defaults (``live`` is true): QEMU reads its monitor byte by byte, and the guest waits.
        arguments = {"filename": self._path}
        self._saving = asyncio.ensure_future(self._source.execute("xen-save-devices-state", arguments, timeout=timeout))
        asyncio.get_running_loop().add_reader(self._pipe, self._receive)

    def send_first_byte(self) -> None:
        """
        Feed the first byte of the state, which is always the same. The destination maps the guest's pages then, while
        the source saves.
        """
        self._incoming.feed(_SECTION)

    async def forward(self, *, timeout: float = STATE_TIMEOUT) -> None:
        """
        Feed what the source writes, without the first byte, to the destination, which begins to load it. Afterwards the
        source has given up its disk images; ``cont`` activates them again. Only the :meth:`end` is missing.

        :raises StateError: the source could not save, or what it wrote is not a device state.
        :raises MonitorError: the source has exited, or does not answer.
        """
        assert self._saving is not None
        self._forwarding = True
        self._forward_received()
        await asyncio.wait({self._saving})  # cancelling us does not cancel the command
        try:
            self._saving.result()
        except CommandError as err:
            raise cannot_save(err) from err
        # Its fd set keeps the pipe open, so there is no end of file: its answer means that this is all.
        self._receive()
        self._stop_receiving()
        if not self._begun:
            raise no_state(self._received)
        await self._wait_drained(timeout)

    async def end(self, *, timeout: float = STATE_TIMEOUT) -> None:
        """
        Feed the last byte. Without it the destination cannot load the state, which matters if a hop is killed: that
        closes the pipe, and QEMU accepts a stream without the description.

        :raises StateError: the destination does not read it.
        """
        self._incoming.feed(bytes(self._received) + EMPTY_DESCRIPTION)
        self._received.clear()
        await self._wait_drained(timeout)
        self._incoming.end()

    async def _wait_drained(self, timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout):
                await self._incoming.drained()
        except TimeoutError as err:
            raise StateError(
                f"cannot load the device state into the new QEMU: not read within {timeout:g} s",
                "raise --timeout on a busy host",
            ) from err

    async def abandon(self) -> bool:
        """
        The state is not needed any more. Wait until the source has saved it, or failed.

        :return: whether it was ordered to save it.
        """
        if self._saving is None:
            return False
        assert self._pipe is not None
        # It is read all the same. A source that cannot write leaks what it has opened (migration/savevm.c:
        # ``qmp_xen_save_devices_state``), and one that waits for room executes no other command.
        self._forwarding = False
        await asyncio.gather(self._saving, return_exceptions=True)
        self._stop_receiving()
        self._pipe.close()
        return True

    def _receive(self) -> None:
        """Read what there is. The event loop calls this: between the source and the destination no task is woken."""
        assert self._pipe is not None
        while data := self._pipe.read(_PIPE_SIZE):
            self._received += data
        if data is not None:
            self._stop_receiving()  # the other end is closed
        self._forward_received()

    def _forward_received(self) -> None:
        if not self._forwarding or not self._received:
            return
        if not self._begun:
            if not self._received.startswith(_BEGINNING):
                return
            del self._received[: len(_BEGINNING)]  # the destination has its header and first byte already
            self._begun = True
        # The last byte, which ends the state, is left for end().
        if len(self._received) > 1:
            self._incoming.feed(bytes(self._received[:-1]))
            del self._received[:-1]

    def _stop_receiving(self) -> None:
        if self._pipe is not None and not self._pipe.closed:
            asyncio.get_running_loop().remove_reader(self._pipe)


def _pipe(exit_stack: contextlib.ExitStack | contextlib.AsyncExitStack) -> tuple[FileIO, FileIO]:
    """A pipe; the stack closes what is still open in the end."""
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    ends = FileIO(read_fd, "rb"), FileIO(write_fd, "wb")
    for end in ends:
        exit_stack.callback(end.close)
    selinux.share(read_fd)
    # Room for the whole state means that neither side waits for the other. Less is only slower.
    with contextlib.suppress(OSError):
        fcntl.fcntl(read_fd, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
    return ends
