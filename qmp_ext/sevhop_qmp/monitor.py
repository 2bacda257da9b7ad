"""
A QMP connection as a hop needs it: every step has a deadline, descriptors can be passed, events can be awaited
without missing one, and it is known *which process* is at the other end.

The protocol itself is qemu.qmp's; its exceptions are translated here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from qemu.qmp import EventListener, ExecuteError, Message, QMPClient, QMPError
from qemu.qmp.protocol import Runstate

from .errors import CommandError, MonitorClosed, MonitorError, MonitorTimeout
from .invalid_data import protocol_errors
from .peer import open_socket, peer_credentials
from .time_limits import COMMAND_TIMEOUT as COMMAND_TIMEOUT  # of this module, for those that use it

# qemu.qmp reports a hang-up through its logger as well as by exception; the exception is enough.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())

#: Seconds in which a monitor must greet. A monitor to which another client is connected accepts, and does not.
GREETING_TIMEOUT = 5.0
#: Turns of the event loop in which qemu.qmp delivers what has arrived, and then some.
_TURNS = 8
#: The ``opaque`` of our fd sets.
FD_MARK = "sevhop"


class Commands(Protocol):
    """
    Passes commands to a QEMU: a :class:`Monitor`, or libvirt, which has the connection to its monitor.

    :ivar name: for messages.
    """

    name: str

    @property
    def version(self) -> str:
        """QEMU's version, such as ``7.2.22``."""

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float | None = None
    ) -> Any:
        """Run a QMP command; see :meth:`Monitor.execute` for what is raised."""

    async def add_fd(self, fd: int) -> tuple[int, int]:
        """Add a descriptor to a new fd set; its number, and the descriptor's number inside QEMU."""

    async def remove_fds(self) -> None:
        """
        Remove the fd sets that commands of ours have left in a QEMU, because they were killed.

        :raises CommandError, MonitorError: QEMU refuses, or does not answer.
        """
        with protocol_errors(self.name):
            for fdset in await self.execute("query-fdsets"):
                if any(fd.get("opaque") == FD_MARK for fd in fdset["fds"]):
                    await self.execute("remove-fd", {"fdset-id": fdset["fdset-id"]})

    async def hmp(self, line: str) -> str:
        """Run a command of the human monitor; for what QMP does not report in the QEMUs that we support."""
        text: str = await self.execute("human-monitor-command", {"command-line": line})
        return text


class Events(Protocol):
    """Events that were collected, see :meth:`SourceMonitor.events`."""

    def clear(self) -> list[Message]:
        """Those that were not taken yet, in their order."""

    def empty(self) -> bool:
        """Whether there are none."""


class SourceMonitor(Commands, Protocol):
    """
    What a hop needs of the monitor of its source: a :class:`Monitor`, or libvirt's, which the hop shares with it.

    :ivar timeout: seconds for each command that has none of its own.
    :ivar in_order: whether commands are executed in the order in which they were sent, without waiting for answers.
    """

    @property
    def timeout(self) -> float: ...

    @property
    def in_order(self) -> bool: ...

    @property
    def closed(self) -> bool:
        """Whether no command can be sent any more."""

    async def close(self) -> None:
        """Send no further command."""

    def events(self, *names: str) -> contextlib.AbstractContextManager[Events]:
        """Collect events of these names meanwhile."""

    async def has_events(self, listener: Events) -> bool:
        """See :meth:`Monitor.has_events`."""

    @property
    def misses_events(self) -> bool:
        """Whether some may have been lost, since whoever passes them on was restarted."""

    def on_first_data(self, act: Callable[[], None]) -> contextlib.AbstractContextManager[None]:
        """See :meth:`Monitor.on_first_data`."""


class _Client(QMPClient):
    """
    qemu.qmp's client, but an event that comes first is not taken for the greeting, or for the answer to the
    negotiation.

    QEMU sends events to a monitor as soon as a client is there, if the one before had negotiated; its greeting follows
    (``monitor_qmp_event`` in monitor/qmp.c).
    """

    _establishing = False

    async def _establish_session(self) -> None:
        self._establishing = True
        try:
            await super()._establish_session()
        finally:
            self._establishing = False

    async def _recv(self) -> Message:
        message = await super()._recv()
        # There is no listener yet, so no event is lost.
        while self._establishing and "event" in message:
            message = await super()._recv()
        return message

    # qemu.qmp's own format each message with an indent, for a debug log that nobody has asked for.

    def _cb_outbound(self, msg: Message) -> Message:
        return msg

    def _cb_inbound(self, msg: Message) -> Message:
        return msg


class Monitor(Commands):
    """
    One connection to the QMP monitor of one QEMU process. Use :meth:`connect`, then ``async with``.

    :ivar peer: pid of the process that serves the socket (SO_PEERCRED); for a socket pair, of its creator.
    :ivar in_order: see :class:`SourceMonitor`.
    """

    in_order = True

    def __init__(self, client: QMPClient, sock: socket.socket, name: str, peer: int, timeout: float) -> None:
        self._client = client
        self._socket = sock
        self._fd_lock = asyncio.Lock()
        self.name = name
        self.peer = peer
        self.timeout = timeout

    @classmethod
    async def connect(
        cls,
        address: Path | str | socket.socket,
        *,
        name: str = "private monitor",
        timeout: float = COMMAND_TIMEOUT,
        greeting_timeout: float = GREETING_TIMEOUT,
    ) -> Self:
        """
        Connect and negotiate.

        :param address: path of a UNIX socket, or a connected socket, which the monitor then owns.
        :param name: of a connected socket, for messages.
        :param timeout: seconds for each later command that has none of its own.
        :param greeting_timeout: seconds until QEMU must have greeted.
        :raises MonitorError: no such socket, no permission, not a QMP monitor, or in use by another client.
        """
        if isinstance(address, socket.socket):
            sock = address
            sock.setblocking(False)
        else:
            name = os.fspath(address)
            sock = await _connect_unix(name, greeting_timeout)
        peer = peer_credentials(sock)[0]
        # No legacy fallback: a monitor that cannot do events and ids is not one that this project can use.
        client = _Client(name)
        try:
            async with asyncio.timeout(greeting_timeout):
                await client.connect(sock)
        except TimeoutError as err:
            sock.close()
            raise MonitorError(
                f"cannot use the monitor {name}: no QMP greeting within {greeting_timeout:g} s",
                "another client is connected, or it is not a QMP monitor; for a domain of libvirt use sevhop upgrade, "
                "otherwise give the guest a second monitor for sevhop",
            ) from err
        except (QMPError, AssertionError) as err:
            sock.close()
            cause = _root_cause(err)
            # qemu.qmp asserts in the end that it is connected; QEMU may have hung up since its last answer.
            if isinstance(err, AssertionError) or isinstance(cause, (EOFError, ConnectionError)):
                raise MonitorClosed(
                    f"cannot use the monitor {name}: it hung up before it could be used", "name a QMP socket of QEMU"
                ) from err
            raise MonitorError(
                f"cannot use the monitor {name}: it does not speak QMP ({_in_words(cause)})",
                "name a QMP socket of QEMU",
            ) from err
        return cls(client, sock, name, peer, timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Disconnect. Errors do not matter any more, so nothing is raised."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(self.timeout):
                await self._client.disconnect()

    @property
    def closed(self) -> bool:
        """Whether the connection is closed, by QEMU or by us."""
        return self._client.runstate != Runstate.RUNNING

    @property
    def version(self) -> str:
        """QEMU's version as it greeted, such as ``7.2.22``."""
        greeting = self._client.greeting
        if greeting is None:
            raise MonitorClosed(f"cannot use the monitor {self.name}: not connected")
        with protocol_errors(self.name):
            return readable_version(greeting.QMP.version)

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float | None = None
    ) -> Any:
        """
        Run a QMP command and return what it returns.

        :param timeout: seconds; the connection's own when not given.
        :raises CommandError: QEMU refused.
        :raises MonitorClosed: QEMU has exited, or closed the connection.
        :raises MonitorTimeout: no answer in time.
        """
        limit = self.timeout if timeout is None else timeout
        try:
            async with asyncio.timeout(limit):
                return await self._client.execute(command, dict(arguments) if arguments else None)
        except TimeoutError as err:
            raise MonitorTimeout(f"QEMU did not answer {command} within {limit:g} s") from err
        except ExecuteError as err:
            raise CommandError(command, err.error.error.desc, err.error_class) from err
        except (QMPError, OSError) as err:
            raise MonitorClosed(f"QEMU hung up during {command}") from err

    async def send_fd(self, name: str, fd: int) -> None:
        """
        Pass a descriptor under a name (QMP ``getfd``). The name belongs to this monitor; a command that
        takes the name consumes it. The caller keeps its own copy.
        """
        # QEMU gives the descriptor to the next command, so nothing may be sent in between.
        async with self._fd_lock:
            self._send(fd)
            await self.execute("getfd", {"fdname": name})

    async def add_fd(self, fd: int) -> tuple[int, int]:
        """
        Add a descriptor to a new fd set (QMP ``add-fd``).

        :return: number of the fd set, and the descriptor's number inside QEMU.
        """
        async with self._fd_lock:
            self._send(fd)
            added = await self.execute("add-fd", {"opaque": FD_MARK})
        return int(added["fdset-id"]), int(added["fd"])

    def _send(self, fd: int) -> None:
        try:
            self._client.send_fd_scm(fd)
        except (OSError, QMPError, AttributeError, AssertionError) as err:
            raise MonitorClosed(
                f"cannot pass a descriptor to QEMU over {self.name}: {_in_words(_root_cause(err))}"
            ) from err

    @contextlib.contextmanager
    def events(self, *names: str) -> Iterator[EventListener]:
        """Collect events of these names from now on, for :meth:`next_event`."""
        with self._client.listener(names) as listener:
            yield listener

    async def next_event(self, listener: EventListener, *, timeout: float | None = None) -> Message:
        """
        Wait for the next event that a listener has collected.

        :raises MonitorClosed: QEMU hung up first.
        :raises MonitorTimeout: none in time.
        """
        if not listener.empty():
            return await listener.get()
        limit = self.timeout if timeout is None else timeout
        event = asyncio.ensure_future(listener.get())
        hangup = asyncio.ensure_future(self._hung_up())
        try:
            await asyncio.wait({event, hangup}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if event.done():
                return event.result()
            if hangup.done():
                raise MonitorClosed("QEMU hung up while an event was awaited")
            raise MonitorTimeout(f"no event from QEMU within {limit:g} s")
        finally:
            event.cancel()
            hangup.cancel()

    @property
    def misses_events(self) -> bool:
        """They come from QEMU itself."""
        return False

    async def has_events(self, listener: Events) -> bool:
        """Whether a listener has collected any event, of all that QEMU has sent until now."""
        # What has arrived is read from the socket in one turn of the loop, and delivered to listeners in the next ones.
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        return not listener.empty()

    @contextlib.contextmanager
    def on_first_data(self, act: Callable[[], None]) -> Iterator[None]:
        """
        Have the event loop call something once, as soon as QEMU sends anything: before it is parsed, and before an
        awaited answer is delivered.

        :raises MonitorClosed: QEMU has hung up.
        """
        loop = asyncio.get_running_loop()
        try:
            # The event loop watches qemu.qmp's own descriptor already, and only once.
            descriptor = os.dup(self._socket.fileno())
        except OSError as err:
            raise MonitorClosed(f"cannot use the monitor {self.name}: QEMU has hung up") from err

        def on_readable() -> None:
            loop.remove_reader(descriptor)
            act()

        loop.add_reader(descriptor, on_readable)
        try:
            yield
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)

    async def _hung_up(self) -> None:
        while self._client.runstate == Runstate.RUNNING:
            await self._client.runstate_changed()


async def _connect_unix(path: str, timeout: float) -> socket.socket:
    sock = open_socket()
    try:
        async with asyncio.timeout(timeout):
            await asyncio.get_running_loop().sock_connect(sock, path)
    except TimeoutError as err:
        sock.close()
        raise MonitorError(
            f"cannot connect to the monitor {path}: not accepted within {timeout:g} s",
            "disconnect other clients, or give the guest a second monitor for sevhop",
        ) from err
    except OSError as err:
        sock.close()
        hint = "run sevhop as root" if isinstance(err, PermissionError) else "name the QMP socket of a running QEMU"
        raise MonitorError(f"cannot connect to the monitor {path}: {err.strerror or err}", hint) from err
    return sock


def readable_version(version: Mapping[str, Any]) -> str:
    """QEMU's version, as people write it."""
    qemu = version["qemu"]
    return ".".join(str(int(qemu[part])) for part in ("major", "minor", "micro"))


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _in_words(error: BaseException) -> str:
    return str(error) or type(error).__name__
