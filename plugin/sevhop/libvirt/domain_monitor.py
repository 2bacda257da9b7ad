"""The monitor of a domain: libvirt has the only connection to it, and passes commands on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import libvirt
import libvirt_qemu
from sevhop_qmp.errors import CommandError, MonitorClosed, MonitorTimeout
from sevhop_qmp.invalid_data import protocol_errors
from sevhop_qmp.monitor import COMMAND_TIMEOUT, FD_MARK, Commands, readable_version

from .daemon import in_thread

#: Seconds for a call that libvirt answers without QEMU.
_CONTROL_TIMEOUT = 0.5
#: What libvirt's connection to a QEMU is doing (virDomainControlState).
_CONTROL_STATES = {
    libvirt.VIR_DOMAIN_CONTROL_OK: "libvirt is not executing it",
    libvirt.VIR_DOMAIN_CONTROL_JOB: "a job of libvirt's is in progress",
    libvirt.VIR_DOMAIN_CONTROL_OCCUPIED: "libvirt is waiting for QEMU",
    libvirt.VIR_DOMAIN_CONTROL_ERROR: "libvirt's connection to QEMU is broken",
}


class DomainMonitor(Commands):
    """
    The monitor of a domain. libvirt is connected to it, and passes commands on.

    :param raw: returns libvirt's own object, another one after a lost connection.
    :param name: of the domain.
    :param limit: returns the seconds that a command may take, if they are less than by default.
    """

    def __init__(self, raw: Callable[[], Any], name: str, limit: Callable[[], float] = lambda: COMMAND_TIMEOUT) -> None:
        self._raw = raw
        self._limit = limit
        self.name = f"domain {name}"
        self._version = ""

    @property
    def version(self) -> str:
        """QEMU's version."""
        return self._version

    async def greet(self) -> None:
        """Query QEMU's version."""
        with protocol_errors(self.name):
            self._version = readable_version(await self.execute("query-version"))

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float | None = None
    ) -> Any:
        """See :meth:`sevhop_qmp.monitor.Monitor.execute`."""
        return await self._execute(command, arguments, (), timeout)

    async def send_fd(self, name: str, fd: int) -> None:
        """See :meth:`sevhop_qmp.monitor.Monitor.send_fd`."""
        await self._execute("getfd", {"fdname": name}, (fd,))

    async def add_fd(self, fd: int) -> tuple[int, int]:
        """See :meth:`sevhop_qmp.monitor.Monitor.add_fd`."""
        added = await self._execute("add-fd", {"opaque": FD_MARK}, (fd,))
        return int(added["fdset-id"]), int(added["fd"])

    async def _execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None,
        fds: tuple[int, ...],
        timeout: float | None = None,
    ) -> Any:
        if timeout is None:
            timeout = min(COMMAND_TIMEOUT, self._limit())
        request: dict[str, object] = {"execute": command}
        if arguments:
            request["arguments"] = dict(arguments)
        function = libvirt_qemu.qemuMonitorCommandWithFiles
        try:
            text, returned = await in_thread(timeout, function, self._raw(), json.dumps(request), list(fds), 0)
        except TimeoutError as err:
            reason = f"QEMU did not answer {command} within {timeout:g} s"
            raise MonitorTimeout(f"{reason} ({await self._control_state()})") from err
        except libvirt.libvirtError as err:
            raise MonitorClosed(f"libvirt cannot send {command} to QEMU: {err.get_error_message()}") from err
        for fd in returned or ():
            os.close(fd)
        answer = json.loads(text)
        if "error" in answer:
            raise CommandError(command, answer["error"]["desc"], answer["error"]["class"])
        return answer["return"]

    async def _control_state(self) -> str:
        """What libvirt is doing with QEMU. It reports that while a command is executed (virDomainGetControlInfo)."""
        try:
            state, _, since = await in_thread(_CONTROL_TIMEOUT, self._raw().controlInfo)
        except (TimeoutError, libvirt.libvirtError):
            return "libvirt does not answer, either"
        doing = _CONTROL_STATES.get(state, f"libvirt's control state is {state}")
        return f"{doing}, for {since / 1000:.1f} s" if since else doing
