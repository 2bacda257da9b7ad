"""
A connection to the libvirt daemon, and calls to it. libvirt's exceptions are translated here.

Every call runs in a thread with a timeout: libvirt has none, and a daemon that hangs must not block the command. A
daemon that is too old is refused by :meth:`Daemon.open`, not found out in the middle of a hop.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from queue import SimpleQueue
from typing import Any, Self
from urllib.parse import urlsplit

import libvirt
from sevhop_qmp.errors import SevhopError

#: Seconds that a call to the daemon may take.
CALL_TIMEOUT = 30.0
#: Seconds that starting an emulator under libvirt may take.
RESTORE_TIMEOUT = 120.0
#: Seconds to wait for a daemon whose connection was lost; one that is restarted is back within a few.
RECONNECT_TIMEOUT = 30.0
_RECONNECT_POLL = 0.1
#: What to do with a daemon that hangs.
RESTART = "restart the libvirt daemon (guests keep running), and try again"
#: Seconds to disconnect, which blocks.
_CLOSE_TIMEOUT = 1.0
#: Parts of a timeout.
_SLICES = 10
#: qemuMonitorCommandWithFiles came with this version (8.2.0), as libvirt counts.
MINIMUM_VERSION = 8_002_000
#: The oldest that all of this was tested with.
TESTED_VERSION = 9_000_000
#: What libvirt reports of a hook that has not exited with 0; before it are the variables that it was given.
_HOOK_FAILED = re.compile(
    r"Hook script execution failed: internal error: Child process \(.*?(?P<hook>/\S*/libvirt/hooks/\S+) [^()]*\)"
    r" unexpected (?P<how>[^:]*):? ?(?P<why>.*)"
)
DEFAULT_URI = "qemu:///system"
#: libvirt's error for a domain that it does not know (virErrorNumber).
NO_DOMAIN: int = libvirt.VIR_ERR_NO_DOMAIN
#: Numbers of those errors after which another user may have success.
_NOT_AUTHORIZED = (libvirt.VIR_ERR_AUTH_FAILED, libvirt.VIR_ERR_AUTH_CANCELLED, libvirt.VIR_ERR_AUTH_UNAVAILABLE)


class DomainError(SevhopError):
    """
    libvirt refused; the message is its own.

    :param code: libvirt's number (virErrorNumber), -1 when there is none.
    """

    def __init__(self, message: str, code: int = -1, hint: str = "") -> None:
        super().__init__(message, hint)
        self.code = code


class DomainTimeout(DomainError):
    """libvirt did not answer in time. What it was asked for may be done later."""


class _DaemonThreads(Executor):
    """
    Threads for calls that may never return: the interpreter does not wait for them when it exits. There is always a
    free one, since a call that resumes a guest must not wait for others.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        self._lock = threading.Lock()
        self._free = 0

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        """See :class:`concurrent.futures.Executor`."""
        future: Future[Any] = Future()
        with self._lock:
            if self._free:
                self._free -= 1
            else:
                threading.Thread(target=self._work, name="libvirt", daemon=True).start()
        self._calls.put((future, functools.partial(function, *arguments, **options)))
        return future

    def _work(self) -> None:
        while True:
            future, function = self._calls.get()
            result = error = None
            if running := future.set_running_or_notify_cancel():
                try:
                    result = function()
                except BaseException as err:
                    error = err
            with self._lock:
                self._free += 1
            if not running:
                continue
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)
            # Not kept until the next call.
            del future, function, result, error


_THREADS = _DaemonThreads()


async def call(function: Callable[..., Any], *arguments: Any, timeout: float = CALL_TIMEOUT) -> Any:
    """
    Call a blocking function of libvirt's.

    :param timeout: seconds.
    :raises DomainError: it failed.
    :raises DomainTimeout: it did not return in time.
    """
    try:
        return await in_thread(timeout, function, *arguments)
    except libvirt.libvirtError as err:
        raise DomainError(_readable(err.get_error_message() or str(err)), err.get_error_code() or -1) from err
    except UnicodeEncodeError as err:
        raise DomainError(f"libvirt knows UTF-8 only, and this is not: {err.object}") from err
    except TimeoutError as err:
        raise DomainTimeout(f"libvirt did not answer within {timeout:g} s", hint=RESTART) from err


def _readable(message: str) -> str:
    """
    An error of libvirt's in one line. That of a hook has a whole command line with its environment, before which nobody
    finds the reason.
    """
    line = "; ".join(filter(None, map(str.strip, message.splitlines())))
    failed = _HOOK_FAILED.fullmatch(line)
    if failed is None:
        return line
    return f"the hook {failed['hook']} has failed ({failed['how']})" + (f": {failed['why']}" if failed["why"] else "")


async def in_thread(timeout: float, function: Callable[..., Any], *arguments: Any) -> Any:
    """
    Call a blocking function of libvirt's.

    :param timeout: seconds, of which those in which this process does not run do not count.
    :raises TimeoutError: the call is still running, but nobody waits for it.
    :raises libvirt.libvirtError: it failed.
    """
    calling = asyncio.get_running_loop().run_in_executor(_THREADS, function, *arguments)
    try:
        # A process that was stopped, or got no processor, for longer than the timeout finds it expired, although
        # libvirt has replied. So it is divided: such a time is one slice at the most, and the rest is still waited for.
        for _ in range(_SLICES):
            await asyncio.wait({calling}, timeout=timeout / _SLICES)
            if calling.done():
                return calling.result()
        raise TimeoutError
    finally:
        calling.cancel()


def is_the_systems(uri: str) -> bool:
    """Whether a URI is the system's QEMU driver on this host; it may have the daemon's socket."""
    parts = urlsplit(uri)
    return (parts.scheme in ("qemu", "qemu+unix")) and (parts.netloc, parts.path) == ("", "/system")


class Daemon:
    """
    A connection to the libvirt daemon of this host. Use :meth:`open`.

    :ivar raw: libvirt's own object.
    :ivar timeout: seconds that a call may take. It is set to less while a guest is stopped.
    """

    def __init__(self, raw: Any, uri: str, timeout: float = CALL_TIMEOUT) -> None:
        self.raw = raw
        self.uri = uri
        self.timeout = timeout

    @classmethod
    async def open(cls, uri: str = DEFAULT_URI, timeout: float = CALL_TIMEOUT) -> Self:
        """
        Connect.

        :param timeout: seconds that a call may take.
        :raises DomainError: no daemon answers, or it is too old, is on another host, or does not run QEMU.
        """
        # By default libvirt prints errors to stderr as well.
        libvirt.registerErrorHandler(lambda *_: None, None)
        try:
            raw = await call(libvirt.open, uri, timeout=timeout)
        except DomainError as err:
            if err.hint:
                raise
            raise DomainError(err.message, err.code, _hint(err, uri)) from err
        self = cls(raw, uri, timeout)
        own = await self.call(raw.getURI)
        if not is_the_systems(own):
            self.close()
            raise DomainError(f"{own} is not the system's QEMU on this host", hint="connect to qemu:///system")
        version = await self.call(raw.getLibVersion)
        if version < MINIMUM_VERSION:
            self.close()
            raise DomainError(f"libvirt {readable_version(version)} is too old", hint="8.2 or later is needed")
        return self

    async def call(self, function: Callable[..., Any], *arguments: Any, timeout: float | None = None) -> Any:
        """
        See :func:`call`.

        :param timeout: seconds, if not those of the connection.
        """
        return await call(function, *arguments, timeout=self.timeout if timeout is None else timeout)

    def close(self) -> None:
        """Disconnect."""
        # A daemon that hangs does not reply to this, either.
        with contextlib.suppress(libvirt.libvirtError, TimeoutError):
            _THREADS.submit(self.raw.close).result(_CLOSE_TIMEOUT)

    async def reconnect(self, patience: float = RECONNECT_TIMEOUT) -> bool:
        """
        Connect again if the connection was lost.

        :param patience: seconds for the daemon to be back, no more than a call may take.
        :return: whether it was.
        :raises DomainError: it is not back by then.
        """
        with contextlib.suppress(DomainError):
            await self.call(self.raw.getLibVersion)
            return False
        patience = min(patience, self.timeout)
        deadline = time.monotonic() + patience
        while True:
            try:
                again = await type(self).open(self.uri, self.timeout)
                break
            except DomainError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(_RECONNECT_POLL)
        self.close()
        self.raw = again.raw
        return True

    async def version(self) -> str:
        """The running daemon's version, such as ``9.0.0``."""
        return readable_version(await self.call(self.raw.getLibVersion))

    async def tested(self) -> bool:
        """Whether the running daemon is one that sevhop was tested with, or newer."""
        return bool(await self.call(self.raw.getLibVersion) >= TESTED_VERSION)


def _hint(error: DomainError, uri: str) -> str:
    """What to do when no connection can be made."""
    if error.code in _NOT_AUTHORIZED or "Permission denied" in error.message:
        return "run sevhop as root"
    if error.code == libvirt.VIR_ERR_SYSTEM_ERROR:
        return "start libvirt's daemon, or correct --connect"
    # The daemon asks polkit whether that user may, and where it cannot ask reports why, not that it has refused.
    return "run sevhop as root" if os.geteuid() and is_the_systems(uri) else ""


def readable_version(number: int) -> str:
    """A version in libvirt's numbers, as people write it."""
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"
