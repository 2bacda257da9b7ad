"""
The few libvirt calls that sevhop makes. libvirt's exceptions are translated here.

Every call runs in a thread with a timeout: libvirt has none, and a daemon that hangs must not block the command. A
daemon that is too old is refused by :meth:`Connection.open`, not found out in the middle of a hop.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shlex
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit
from xml.etree import ElementTree

import libvirt
import libvirt_qemu
from sevhop_qmp.errors import CommandError, MonitorClosed, MonitorTimeout, SevhopError
from sevhop_qmp.monitor import COMMAND_TIMEOUT, FD_MARK, Commands, protocol_errors
from sevhop_qmp.monitor import readable_version as _qemu_version

#: Seconds that a call to the daemon may take.
CALL_TIMEOUT = 30.0
#: Seconds that starting an emulator under libvirt may take.
RESTORE_TIMEOUT = 120.0
#: qemuMonitorCommandWithFiles came with this version (8.2.0), as libvirt counts.
MINIMUM_VERSION = 8_002_000
#: The oldest that all of this was tested with.
TESTED_VERSION = 9_000_000
DEFAULT_URI = "qemu:///system"
#: Where the daemon of the system keeps the pid of each QEMU.
_PID_FILES = Path("/run/libvirt/qemu")
#: A URI at which there is no daemon.
_NOWHERE = "qemu+unix:///system?socket=/dev/null"
_POLL = 0.001
#: Base label of the security model "dac" in the daemon's capabilities: numbers, after a plus sign.
_DAC_LABEL = re.compile(r"\+(?P<uid>\d+):\+(?P<gid>\d+)")
_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")
#: Seconds to wait for a daemon whose connection was lost; one that is restarted is back within a few.
RECONNECT_TIMEOUT = 30.0
_RECONNECT_POLL = 0.1
#: libvirt's error for a domain that it does not know (virErrorNumber).
NO_DOMAIN: int = libvirt.VIR_ERR_NO_DOMAIN
#: Its errors for a domain that has no QEMU, or was transient and is gone with it.
_OFF = (libvirt.VIR_ERR_OPERATION_INVALID, NO_DOMAIN)


class DomainError(SevhopError):
    """
    libvirt refused; the message is its own.

    :param code: libvirt's number (virErrorNumber), -1 when there is none.
    """

    def __init__(self, message: str, code: int = -1, hint: str = "") -> None:
        super().__init__(message, hint)
        self.code = code


#: For calls to libvirt. asyncio's own threads are few, and a call that resumes a guest must not wait for others.
_THREADS = ThreadPoolExecutor(max_workers=256, thread_name_prefix="libvirt")


async def _call(function: Callable[..., Any], *arguments: Any, timeout: float = CALL_TIMEOUT) -> Any:
    try:
        return await _in_thread(timeout, function, *arguments)
    except libvirt.libvirtError as err:
        raise DomainError(err.get_error_message() or str(err), err.get_error_code() or -1) from err
    except TimeoutError as err:
        raise DomainError(f"libvirt did not answer within {timeout:g} s") from err


def _is_the_systems(uri: str) -> bool:
    """Whether a URI is the system's QEMU driver on this host; it may have the daemon's socket."""
    parts = urlsplit(uri)
    return (parts.scheme in ("qemu", "qemu+unix")) and (parts.netloc, parts.path) == ("", "/system")


async def _in_thread(timeout: float, function: Callable[..., Any], *arguments: Any) -> Any:
    """:raises TimeoutError: the call is still running, but nobody waits for it."""
    calling = asyncio.get_running_loop().run_in_executor(_THREADS, function, *arguments)
    async with asyncio.timeout(timeout):
        return await calling


class Connection:
    """A connection to the libvirt daemon of this host. Use :meth:`open`."""

    def __init__(self, raw: Any, uri: str) -> None:
        self._raw = raw
        self.uri = uri

    @classmethod
    async def open(cls, uri: str = DEFAULT_URI) -> Self:
        """
        Connect.

        :raises DomainError: no daemon answers, or it is too old, is on another host, or does not run QEMU.
        """
        # By default libvirt prints errors to stderr as well.
        libvirt.registerErrorHandler(lambda *_: None, None)
        raw = await _call(libvirt.open, uri)
        self = cls(raw, uri)
        own = await _call(raw.getURI)
        if not _is_the_systems(own):
            self.close()
            raise DomainError(f"{own} is not the system's QEMU on this host", hint="connect to qemu:///system")
        version = await _call(raw.getLibVersion)
        if version < MINIMUM_VERSION:
            self.close()
            raise DomainError(f"libvirt {readable_version(version)} is too old", hint="8.2 or later is needed")
        return self

    def close(self) -> None:
        """Disconnect."""
        with contextlib.suppress(libvirt.libvirtError):
            self._raw.close()

    async def reconnect(self, patience: float = RECONNECT_TIMEOUT) -> bool:
        """
        Connect again if the connection was lost.

        :return: whether it was.
        :raises DomainError: the daemon is not back within ``patience`` seconds.
        """
        with contextlib.suppress(DomainError):
            await _call(self._raw.getLibVersion)
            return False
        deadline = time.monotonic() + patience
        while True:
            try:
                again = await Connection.open(self.uri)
                break
            except DomainError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(_RECONNECT_POLL)
        self.close()
        self._raw = again._raw
        return True

    async def version(self) -> str:
        """The running daemon's version, such as ``9.0.0``."""
        return readable_version(await _call(self._raw.getLibVersion))

    async def qemu_user(self) -> tuple[int, int]:
        """User and group that QEMU runs as unless a domain has its own; root's where the daemon reports none."""
        capabilities = ElementTree.fromstring(await _call(self._raw.getCapabilities))
        for model in capabilities.iterfind("host/secmodel"):
            label = _DAC_LABEL.fullmatch(model.findtext("baselabel") or "")
            if model.findtext("model") == "dac" and label:
                return int(label["uid"]), int(label["gid"])
        return 0, 0

    async def tested(self) -> bool:
        """Whether the running daemon is one that sevhop was tested with, or newer."""
        return bool(await _call(self._raw.getLibVersion) >= TESTED_VERSION)

    async def domain(self, name: str) -> Domain:
        """:raises DomainError: there is no such domain."""
        return Domain(self, await _call(self._raw.lookupByName, name))

    async def domain_with(self, uuid: str) -> Domain | None:
        """
        The domain with a UUID, whatever it is called; None if the daemon knows none.

        :raises DomainError: the daemon does not answer.
        """
        try:
            return Domain(self, await _call(self._raw.lookupByUUIDString, uuid))
        except DomainError as err:
            if err.code == NO_DOMAIN:
                return None
            raise

    async def domains(self) -> list[Domain]:
        """The active ones, by name."""
        found = await _call(self._raw.listAllDomains, libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
        return sorted((Domain(self, raw) for raw in found), key=lambda domain: domain.name)

    async def default_emulator(self) -> tuple[str, str]:
        """
        The daemon's default for a new domain: its type (``kvm`` or ``qemu``), and the emulator.

        :raises DomainError: it has no emulator.
        """
        text = await _call(self._raw.getDomainCapabilities, None, None, None, None, 0, timeout=RESTORE_TIMEOUT)
        found = ElementTree.fromstring(text)
        return found.findtext("domain", ""), found.findtext("path", "")

    async def probe_capabilities(self, emulator: str, arch: str, machine: str, kind: str) -> None:
        """
        Have the daemon probe an emulator, and cache the result. That takes seconds the first time, which would
        otherwise be downtime.

        :raises DomainError: it is no emulator for such a domain.
        """
        await _call(self._raw.getDomainCapabilities, emulator, arch, machine, kind, 0, timeout=RESTORE_TIMEOUT)

    async def command_line(self, xml: str) -> tuple[dict[str, str], list[str]]:
        """
        The command line that the daemon would start a domain with: environment, and the emulator with its arguments.

        The XML must have no network interfaces: libvirt converts them here, and creates tap devices for them.

        :raises DomainError: it cannot be started at all.
        """
        text = await _call(self._raw.domainXMLToNative, "qemu-argv", xml, 0, timeout=RESTORE_TIMEOUT)
        argv = shlex.split(text)
        first = next(number for number, argument in enumerate(argv) if not _ASSIGNMENT.match(argument))
        return dict(variable.split("=", 1) for variable in argv[:first]), argv[first:]

    async def restore(self, image: str) -> None:
        """
        Restore a saved domain.

        :raises DomainError: it failed; the image is still there.
        """
        await _call(self._raw.restore, image, timeout=RESTORE_TIMEOUT)

    async def define(self, xml: str) -> None:
        """Replace the persistent definition of a domain."""
        await _call(self._raw.defineXML, xml)


class Domain:
    """
    One domain.

    :ivar name: unique in its daemon.
    """

    def __init__(self, connection: Connection, raw: Any) -> None:
        self._connection = connection
        self._raw = raw
        self.name: str = raw.name()
        self.uuid: str = raw.UUIDString()

    async def reconnect(self, patience: float = RECONNECT_TIMEOUT) -> bool:
        """
        Connect again if the daemon was restarted; until then every call fails.

        :return: whether it was.
        :raises DomainError: it is not back in time, or does not know the domain any more.
        """
        lost = await self._connection.reconnect(patience)
        if lost:
            self._raw = await _call(self._connection._raw.lookupByUUIDString, self.uuid)
        return lost

    async def active(self) -> bool:
        """Whether it has a QEMU."""
        return bool(await _call(self._raw.isActive))

    async def persistent(self) -> bool:
        """Whether it stays defined without a QEMU."""
        return bool(await _call(self._raw.isPersistent))

    async def running(self) -> bool:
        """Whether its guest runs."""
        state, _ = await _call(self._raw.state)
        return bool(state in (libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_BLOCKED))

    async def saved(self) -> bool:
        """Whether its QEMU has exited because the guest was saved."""
        state, reason = await _call(self._raw.state)
        return bool((state, reason) == (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_SAVED))

    async def managed_save(self) -> bool:
        """Whether libvirt keeps a saved state of it for the next start."""
        return bool(await _call(self._raw.hasManagedSaveImage))

    async def snapshots_and_checkpoints(self) -> tuple[int, int]:
        """Their numbers, as libvirt has them."""
        checkpoints = await _call(self._raw.listAllCheckpoints)
        return int(await _call(self._raw.snapshotNum)), len(checkpoints)

    async def autodestroy(self) -> bool:
        """
        Whether libvirt destroys it when the client that started it disconnects. No call reports that, but libvirt
        migrates no such domain, and checks that first; no daemon is at the URI, so the migration fails in any case.
        """
        flags = libvirt.VIR_MIGRATE_PEER2PEER | libvirt.VIR_MIGRATE_LIVE
        try:
            await _call(self._raw.migrateToURI3, _NOWHERE, {}, flags)
        except DomainError as err:
            return "auto destroy" in err.message
        return False

    async def job(self) -> bool:
        """Whether a job of libvirt's is in progress on it."""
        return bool((await _call(self._raw.jobInfo))[0] != libvirt.VIR_DOMAIN_JOB_NONE)

    async def xml(self) -> str:
        """As it runs, in the form of a save image."""
        flags = libvirt.VIR_DOMAIN_XML_SECURE | libvirt.VIR_DOMAIN_XML_MIGRATABLE
        return str(await _call(self._raw.XMLDesc, flags))

    async def live_xml(self) -> str:
        """As it runs, with what libvirt has chosen for it."""
        return str(await _call(self._raw.XMLDesc, 0))

    async def inactive_xml(self) -> str:
        """As it will start the next time."""
        return str(await _call(self._raw.XMLDesc, libvirt.VIR_DOMAIN_XML_SECURE | libvirt.VIR_DOMAIN_XML_INACTIVE))

    async def suspend(self) -> None:
        """Stop the guest."""
        await _call(self._raw.suspend)

    async def resume(self) -> None:
        """Resume the guest."""
        await _call(self._raw.resume)

    async def destroy(self) -> None:
        """Have libvirt clean up after a QEMU; one that still runs is killed. libvirt may be restarted meanwhile."""
        try:
            await _call(self._raw.destroy)
        except DomainError as err:
            if err.code not in _OFF:
                try:
                    if not await self.reconnect():
                        raise
                    await _call(self._raw.destroy)
                except DomainError as again:
                    if again.code not in _OFF:
                        raise
        # libvirt may be cleaning up already, since QEMU has exited. Its last step makes the domain inactive.
        deadline = time.monotonic() + CALL_TIMEOUT
        while await self._still_active():
            if time.monotonic() > deadline:
                raise DomainError(f"libvirt reports domain {self.name} as active although its QEMU has exited")
            await asyncio.sleep(_POLL)

    async def _still_active(self) -> bool:
        try:
            return await self.active()
        except DomainError as err:
            if err.code == NO_DOMAIN:
                return False
            raise

    async def monitor(self) -> DomainMonitor:
        """:raises SevhopError: it does not answer."""
        monitor = DomainMonitor(self)
        await monitor.greet()
        return monitor

    def pid(self) -> int:
        """
        The pid of its QEMU.

        :raises DomainError: it cannot be found.
        """
        pid = self._last_pid()
        if not self._is_its_qemu(pid):
            raise DomainError(f"process {pid} is not the QEMU of domain {self.name}")
        return pid

    def living_pid(self) -> int | None:
        """
        The pid of an active domain; None if its QEMU has exited and libvirt has not cleaned up yet.

        :raises DomainError: it cannot be found.
        """
        pid = self._last_pid()
        return pid if self._is_its_qemu(pid) else None

    def _last_pid(self) -> int:
        try:
            return int((_PID_FILES / f"{self.name}.pid").read_text())
        except (OSError, ValueError) as err:
            raise DomainError(f"cannot find the QEMU process of domain {self.name}: {err}") from err

    def _is_its_qemu(self, pid: int) -> bool:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            return self.uuid.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return False


class DomainMonitor(Commands):
    """The monitor of a domain. libvirt is connected to it, and passes commands on."""

    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self.name = f"domain {domain.name}"
        self._version = ""

    @property
    def version(self) -> str:
        """QEMU's version."""
        return self._version

    async def greet(self) -> None:
        """Query QEMU's version."""
        with protocol_errors(self.name):
            self._version = _qemu_version(await self.execute("query-version"))

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float | None = None
    ) -> Any:
        """See :meth:`sevhop_qmp.monitor.Monitor.execute`."""
        return await self._execute(command, arguments, (), COMMAND_TIMEOUT if timeout is None else timeout)

    async def add_fd(self, fd: int) -> tuple[int, int]:
        """See :meth:`sevhop_qmp.monitor.Monitor.add_fd`."""
        added = await self._execute("add-fd", {"opaque": FD_MARK}, (fd,), COMMAND_TIMEOUT)
        return int(added["fdset-id"]), int(added["fd"])

    async def _execute(
        self, command: str, arguments: Mapping[str, object] | None, fds: tuple[int, ...], timeout: float
    ) -> Any:
        request: dict[str, object] = {"execute": command}
        if arguments:
            request["arguments"] = dict(arguments)
        function = libvirt_qemu.qemuMonitorCommandWithFiles
        try:
            text, returned = await _in_thread(timeout, function, self._domain._raw, json.dumps(request), list(fds), 0)
        except TimeoutError as err:
            raise MonitorTimeout(f"QEMU did not answer {command} within {timeout:g} s") from err
        except libvirt.libvirtError as err:
            raise MonitorClosed(f"libvirt cannot send {command} to QEMU: {err.get_error_message()}") from err
        for fd in returned or ():
            os.close(fd)
        answer = json.loads(text)
        if "error" in answer:
            raise CommandError(command, answer["error"]["desc"], answer["error"]["class"])
        return answer["return"]


def readable_version(number: int) -> str:
    """A version in libvirt's numbers, as people write it."""
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"
