"""
An upgrade of a domain in which something goes wrong: run as a program, so that it may be killed. ::

    python -m tests.support.faults.broken_upgrade DOMAIN EMULATOR POINT FAULT [OPERATOR]

It hops like ``sevhop upgrade --no-transit``; see :mod:`.fault` for POINT and FAULT, and :mod:`.operator`. An action is
``monitor COMMAND`` (a command that it gives to the source), ``libvirt FUNCTION``, or ``keeper REQUEST``. Exit status:
that of ``sevhop upgrade``.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from typing import Any

from sevhop.engine.upgrade import Upgrade
from sevhop.install import verification
from sevhop.keeper.client import KeeperClient
from sevhop.keeper.config import KeeperError
from sevhop.libvirt import daemon as libvirt_daemon
from sevhop.libvirt.daemon import DEFAULT_URI, DomainError
from sevhop.libvirt.domain_monitor import DomainMonitor
from sevhop.options import UpgradeOptions
from sevhop_qmp.errors import CommandError, MonitorTimeout
from sevhop_qmp.peer import peer_credentials

from .fault import Fault, patched, run
from .operator import Operator

Original = Callable[..., Awaitable[Any]]

#: In the first points the guest runs, but for the rehearsal's pause; then it is stopped in its old QEMU. What the
#: rehearsal does is the first of its kind.
IN_THE_SOURCE = (
    "phase acquire",
    "after keeper status 0",
    "phase rehearse",
    "after monitor add-fd 0",
    "before monitor stop 0",
    "after monitor stop 0",
    "before monitor xen-save-devices-state 0",
    "before monitor cont 0",
    "phase prepare",
    "after monitor add-fd 1",
    "phase stop",
    "before libvirt suspend 0",
    "after libvirt suspend 0",
    "phase save",
    "before monitor xen-save-devices-state 1",
    "after monitor xen-save-devices-state 1",
    "after keeper blocks 0",
    "phase terminate",
    "before keeper retire 0",
)
#: Where others can still do something to the guest, which is seen, but for the last: then nobody is asked any more.
OTHERS_CHANGE = (
    *("phase acquire", "after keeper status 0", "phase rehearse", "phase prepare", "after monitor add-fd 1"),
    "phase stop",
)
#: The keeper has ended its old QEMU, and only the keeper has it.
HELD = (
    "after keeper retire 0",
    "before libvirt destroy 0",
    "phase restore",
    "before libvirt restore 0",
)
#: From here on it runs in the new one.
RUNNING = (
    "after libvirt restore 0",
    "phase define",
    "before libvirt defineXML 0",
    "after libvirt defineXML 0",
    "before keeper release 0",
)


class Broken:
    """
    An upgrade with one fault. What it does with libvirt, the source and the keeper are actions.

    :param destination: the pid of the QEMU that is being started.
    """

    def __init__(
        self,
        name: str,
        options: UpgradeOptions,
        point: str,
        kind: str,
        operator: str,
        destination: Callable[[Upgrade], int] = lambda upgrade: upgrade.report.destination_pid,
    ) -> None:
        self.keeper = 0
        self.fault = Fault(
            point,
            kind,
            {
                "source": lambda: self.upgrade.report.source_pid,
                "destination": lambda: destination(self.upgrade),
                "keeper": lambda: self.keeper,
                "daemon": lambda: next(iter(verification.daemons().values())),
            },
            Operator.parsed(operator).at if operator else lambda _: None,
        )
        self.upgrade = Upgrade(DEFAULT_URI, name, options, self.fault.heard)
        patched(DomainMonitor, "_execute", self._execute)
        patched(libvirt_daemon, "call", self._call)
        patched(KeeperClient, "_ask", self._ask)

    async def _execute(self, original: Original, monitor: DomainMonitor, command: str, *arguments: Any) -> Any:
        return await self.fault.around(
            f"monitor {command}",
            lambda: original(monitor, command, *arguments),
            CommandError(command, "refused for a test"),
            MonitorTimeout(f"QEMU did not answer {command}, for a test"),
        )

    async def _call(self, original: Original, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        # Whether the hook is called is verified by a restore, once for each daemon.
        probe = any("/probe-" in str(argument) for argument in arguments)
        return await self.fault.around(
            "libvirt probe" if probe else f"libvirt {function.__name__}",
            lambda: original(function, *arguments, **options),
            DomainError("refused for a test"),
            DomainError("libvirt did not answer, for a test"),
        )

    async def _ask(self, original: Original, process: KeeperClient, request: str) -> Any:
        self.keeper = peer_credentials(process._control)[0]
        return await self.fault.around(
            f"keeper {request.split()[0]}",
            lambda: original(process, request),
            KeeperError("refused for a test"),
            KeeperError("the keeper did not answer, for a test"),
        )


def main(name: str, emulator: str, point: str, kind: str, operator: str = "") -> int:
    """Upgrade."""
    options = UpgradeOptions(emulator=emulator, transit=False)
    return run(Broken(name, options, point, kind, operator).upgrade)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:6]))
