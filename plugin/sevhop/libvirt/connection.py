"""
The few libvirt calls that sevhop makes. libvirt's exceptions end here.

Every call runs in a thread with a time limit: libvirt has none, and a daemon that hangs must not take the command with
it. What needs a newer daemon than is running is refused by :func:`connect`, not found out in the middle of a hop.
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
from sevhop_qmp.monitor import COMMAND_TIMEOUT, FD_MARK, Commands, understood
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
#: An address at which there is no daemon.
_NOWHERE = "qemu+unix:///system?socket=/dev/null"
_POLL = 0.001
#: Of the security model "dac" in the daemon's capabilities: numbers, after a plus sign.
_DAC_LABEL = re.compile(r"\+(?P<uid>\d+):\+(?P<gid>\d+)")
_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")
#: Seconds for which a daemon is waited for that has gone away; one that is restarted is back within a few.
RETURN_TIMEOUT = 30.0
_RETURN_POLL = 0.1
#: What libvirt says of a domain that it does not know (virErrorNumber).
NO_DOMAIN: int = libvirt.VIR_ERR_NO_DOMAIN
#: What it says of a domain that has no QEMU, or was forgotten with it.
_OFF = (libvirt.VIR_ERR_OPERATION_INVALID, NO_DOMAIN)


class DomainError(SevhopError):
    """
    libvirt refused; the message is its own.

    :param code: libvirt's number (virErrorNumber), -1 when there is none.
    """

    def __init__(self, message: str, code: int = -1, hint: str = "") -> None:
        super().__init__(message, hint)
        self.code = code


#: For calls to libvirt. asyncio's own threads are few, and what lets a guest run must not wait for calls of others.
_THREADS = ThreadPoolExecutor(max_workers=256, thread_name_prefix="libvirt")


async def _call(function: Callable[..., Any], *arguments: Any, timeout: float = CALL_TIMEOUT) -> Any:
    try:
        return await _in_thread(timeout, function, *arguments)
    except libvirt.libvirtError as err:
        raise DomainError(err.get_error_message() or str(err), err.get_error_code() or -1) from err
    except TimeoutError as err:
        raise DomainError(f"libvirt did not answer within {timeout:g} s") from err


def _is_the_systems(uri: str) -> bool:
    """Whether a URI leads to the system's QEMU on this host; the daemon's socket may be named."""
    parts = urlsplit(uri)
    return (parts.scheme in ("qemu", "qemu+unix")) and (parts.netloc, parts.path) == ("", "/system")


async def _in_thread(timeout: float, function: Callable[..., Any], *arguments: Any) -> Any:
    """:raises TimeoutError: it goes on, but nobody waits for it."""
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

        :raises DomainError: nobody answers, the daemon is too old, is on another host, or does not run QEMU.
        """
        # libvirt prints errors to stderr as well; the exception is enough.
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
        """Hang up."""
        with contextlib.suppress(libvirt.libvirtError):
            self._raw.close()

    async def reopen_if_lost(self, patience: float = RETURN_TIMEOUT) -> bool:
        """
        Connect again if the daemon went away meanwhile.

        :return: whether it did.
        :raises DomainError: it did not come back within ``patience`` seconds.
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
                await asyncio.sleep(_RETURN_POLL)
        self.close()
        self._raw = again._raw
        return True

    async def version(self) -> str:
        """The running daemon's version, such as ``9.0.0``."""
        return readable_version(await _call(self._raw.getLibVersion))

    async def qemu_user(self) -> tuple[int, int]:
        """User and group that QEMU runs as unless a domain says otherwise; root's where the daemon names none."""
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
        """Those that are active, by name."""
        found = await _call(self._raw.listAllDomains, libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
        return sorted((Domain(self, raw) for raw in found), key=lambda domain: domain.name)

    async def default_emulator(self) -> tuple[str, str]:
        """
        What the daemon would start a new domain with: its type (``kvm`` or ``qemu``), and the emulator.

        :raises DomainError: it has no emulator.
        """
        text = await _call(self._raw.getDomainCapabilities, None, None, None, None, 0, timeout=RESTORE_TIMEOUT)
        found = ElementTree.fromstring(text)
        return found.findtext("domain", ""), found.findtext("path", "")

    async def learn(self, emulator: str, arch: str, machine: str, kind: str) -> None:
        """
        Have the daemon find out what an emulator can do. It takes seconds the first time, and would do so with the
        guest stopped otherwise.

        :raises DomainError: it is no emulator for such a domain.
        """
        await _call(self._raw.getDomainCapabilities, emulator, arch, machine, kind, 0, timeout=RESTORE_TIMEOUT)

    async def command_line(self, xml: str) -> tuple[dict[str, str], list[str]]:
        """
        What the daemon would start a domain with: environment, and the emulator with its arguments.

        Network interfaces must not be in the XML: libvirt makes others of them here, and tap devices for these.

        :raises DomainError: it cannot be started at all.
        """
        text = await _call(self._raw.domainXMLToNative, "qemu-argv", xml, 0, timeout=RESTORE_TIMEOUT)
        words = shlex.split(text)
        first = next(number for number, word in enumerate(words) if not _ASSIGNMENT.match(word))
        return dict(word.split("=", 1) for word in words[:first]), words[first:]

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

    async def find_again(self, patience: float = RETURN_TIMEOUT) -> bool:
        """
        Go on with a daemon that was restarted. Until then every call fails if it was.

        :return: whether it was.
        :raises DomainError: it did not come back, or does not know the domain any more.
        """
        lost = await self._connection.reopen_if_lost(patience)
        if lost:
            self._raw = await _call(self._connection._raw.lookupByUUIDString, self.uuid)
        return lost

    async def active(self) -> bool:
        """Whether it has a QEMU."""
        return bool(await _call(self._raw.isActive))

    async def persistent(self) -> bool:
        """Whether it stays defined when it ends."""
        return bool(await _call(self._raw.isPersistent))

    async def running(self) -> bool:
        """Whether its guest runs."""
        state, _ = await _call(self._raw.state)
        return bool(state in (libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_BLOCKED))

    async def saved(self) -> bool:
        """Whether its QEMU has ended because the guest was saved."""
        state, reason = await _call(self._raw.state)
        return bool((state, reason) == (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_SAVED))

    async def managed_save(self) -> bool:
        """Whether libvirt keeps a saved state of it for the next start."""
        return bool(await _call(self._raw.hasManagedSaveImage))

    async def moments(self) -> tuple[int, int]:
        """How many snapshots and checkpoints libvirt knows of it."""
        checkpoints = await _call(self._raw.listAllCheckpoints)
        return int(await _call(self._raw.snapshotNum)), len(checkpoints)

    async def ends_with_its_client(self) -> bool:
        """
        Whether it is marked for auto destroy. libvirt tells nobody, but it migrates no such domain, and looks at that
        first; the address is one that nobody could reach, so nothing else comes of it.
        """
        flags = libvirt.VIR_MIGRATE_PEER2PEER | libvirt.VIR_MIGRATE_LIVE
        try:
            await _call(self._raw.migrateToURI3, _NOWHERE, {}, flags)
        except DomainError as err:
            return "auto destroy" in err.message
        return False

    async def job(self) -> bool:
        """Whether libvirt is doing something lengthy with it."""
        return bool((await _call(self._raw.jobInfo))[0] != libvirt.VIR_DOMAIN_JOB_NONE)

    async def xml(self) -> str:
        """As it runs, in the form that a saved domain has."""
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
        """Let the guest go on."""
        await _call(self._raw.resume)

    async def end(self) -> None:
        """Have libvirt clean up behind a QEMU; one that has not ended is killed. It may be restarted meanwhile."""
        try:
            await _call(self._raw.destroy)
        except DomainError as err:
            if err.code not in _OFF:
                try:
                    if not await self.find_again():
                        raise
                    await _call(self._raw.destroy)
                except DomainError as again:
                    if again.code not in _OFF:
                        raise
        # libvirt may be cleaning up already, having seen QEMU end. Its last step makes the domain inactive.
        deadline = time.monotonic() + CALL_TIMEOUT
        while await self._still_active():
            if time.monotonic() > deadline:
                raise DomainError(f"libvirt believes that domain {self.name} is active although its QEMU has ended")
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

        :raises DomainError: it cannot be told.
        """
        pid = self._last_pid()
        if not self._is_its_qemu(pid):
            raise DomainError(f"process {pid} is not the QEMU of domain {self.name}")
        return pid

    def living_pid(self) -> int | None:
        """
        The same of an active domain; None if its QEMU has ended and libvirt has not cleaned up behind it yet.

        :raises DomainError: it cannot be told.
        """
        pid = self._last_pid()
        return pid if self._is_its_qemu(pid) else None

    def _last_pid(self) -> int:
        try:
            return int((_PID_FILES / f"{self.name}.pid").read_text())
        except (OSError, ValueError) as err:
            raise DomainError(f"the QEMU process of domain {self.name} cannot be told: {err}") from err

    def _is_its_qemu(self, pid: int) -> bool:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            return self.uuid.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return False


class DomainMonitor(Commands):
    """The monitor of a domain. libvirt holds it, and passes commands on."""

    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self.name = f"domain {domain.name}"
        self._version = ""

    @property
    def version(self) -> str:
        """QEMU's version."""
        return self._version

    async def greet(self) -> None:
        """Learn QEMU's version."""
        with understood(self.name):
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
            raise MonitorClosed(f"QEMU cannot be asked {command}: {err.get_error_message()}") from err
        for fd in returned or ():
            os.close(fd)
        answer = json.loads(text)
        if "error" in answer:
            raise CommandError(command, answer["error"]["desc"], answer["error"]["class"])
        return answer["return"]


def readable_version(number: int) -> str:
    """A version as libvirt counts, as people write it."""
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"
