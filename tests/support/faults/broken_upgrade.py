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
from pathlib import Path
from typing import Any

from sevhop.engine.upgrade import Upgrade
from sevhop.keeper.client import KeeperClient
from sevhop.keeper.config import KeeperError
from sevhop.libvirt import daemon as libvirt_daemon
from sevhop.libvirt.daemon import DEFAULT_URI, DomainError
from sevhop.libvirt.domain_monitor import DomainMonitor
from sevhop.options import UpgradeOptions
from sevhop_qmp.errors import CommandError, MonitorTimeout
from sevhop_qmp.monitor import peer_credentials

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


def main(name: str, emulator: str, point: str, kind: str, operator: str = "") -> int:
    """Upgrade."""
    keeper = 0
    fault = Fault(
        point,
        kind,
        {
            "source": lambda: upgrade.report.source_pid,
            "destination": lambda: upgrade.report.destination_pid,
            "keeper": lambda: keeper,
            "daemon": lambda: int(Path("/run/libvirtd.pid").read_text()),
        },
        Operator.parsed(operator).at if operator else lambda _: None,
    )
    upgrade = Upgrade(DEFAULT_URI, name, UpgradeOptions(emulator=emulator, transit=False), fault.heard)

    async def execute(original: Original, monitor: DomainMonitor, command: str, *arguments: Any) -> Any:
        return await fault.around(
            f"monitor {command}",
            lambda: original(monitor, command, *arguments),
            CommandError(command, "refused for a test"),
            MonitorTimeout(f"QEMU did not answer {command}, for a test"),
        )

    async def call(original: Original, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        # Whether the hook is called is verified by a restore, once for each daemon.
        probe = any("/probe-" in str(argument) for argument in arguments)
        return await fault.around(
            "libvirt probe" if probe else f"libvirt {function.__name__}",
            lambda: original(function, *arguments, **options),
            DomainError("refused for a test"),
            DomainError("libvirt did not answer, for a test"),
        )

    async def ask(original: Original, process: KeeperClient, request: str) -> Any:
        nonlocal keeper
        keeper = peer_credentials(process._control)[0]
        return await fault.around(
            f"keeper {request.split()[0]}",
            lambda: original(process, request),
            KeeperError("refused for a test"),
            KeeperError("the keeper did not answer, for a test"),
        )

    patched(DomainMonitor, "_execute", execute)
    patched(libvirt_daemon, "call", call)
    patched(KeeperClient, "_ask", ask)
    return run(upgrade)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:6]))
