"""
The same as :mod:`.broken_upgrade`, by way of a transit. ::

    python -m tests.support.faults.broken_transit DOMAIN EMULATOR POINT FAULT [OPERATOR]

More actions: ``transit COMMAND`` is given to the transit in the first hop; ``halt`` and ``stream-end`` are those of
:mod:`.broken_hop`. A ``destination`` is the transit. The second hop is the keeper's.
"""

from __future__ import annotations

import sys
from typing import Any

from sevhop.engine.upgrade import Upgrade
from sevhop.options import UpgradeOptions
from sevhop_qmp.device_state import OutgoingState
from sevhop_qmp.errors import CommandError, MonitorTimeout, ProcessError, StateError
from sevhop_qmp.monitor import Monitor
from sevhop_qmp.process import QemuProcess

from .broken_upgrade import Broken, Original
from .fault import patched, run

#: In the first points all that there is of the guest is in its old QEMU.
IN_THE_SOURCE = (
    "phase acquire",
    "phase prepare",
    "before transit x-sev-adopt-ram 0",
    "after transit x-sev-adopt-ram 0",
    "before transit migrate-incoming 0",
    "after transit migrate-incoming 0",
    "after monitor add-fd 1",
    "phase stop",
    "before monitor stop 0",
    "after monitor stop 0",
    "phase map",
    "phase save",
    "before monitor xen-save-devices-state 0",
)
#: Where others can still do something to the guest, which is seen.
OTHERS_CHANGE = ("phase acquire", "phase prepare", "after transit x-sev-adopt-ram 0", "phase stop")
#: Then it is in the transit, too. A guest that has a dirty bitmap does not run there before the command lets it.
SAVED = (
    "phase load",
    "before halt 0",
    "after halt 0",
    "before stream-end 0",
    "after stream-end 0",
    "phase commit",
    "phase resume",
)
#: From here on it runs in the transit, and whatever fails, it does so until ...
IN_TRANSIT = (
    "phase finish",
    "before transit x-sev-adopt-finish 0",
    "after transit x-sev-adopt-finish 0",
    "phase keep",
    "before keeper status 0",
    "phase retire",
    "before libvirt destroy 0",
    "after libvirt destroy 0",
    "phase restore",
    "before keeper emulator 0",
    "before libvirt restore 0",
)
#: ... it has hopped once more, or is about to.
RESTORED = (
    "after libvirt restore 0",
    "before libvirt defineXML 0",
    "after libvirt defineXML 0",
    "before keeper release 0",
)
#: In these a keeper has the transit.
KEPT = (*IN_TRANSIT[IN_TRANSIT.index("before keeper status 0") :], *RESTORED[:-1])


def main(name: str, emulator: str, point: str, kind: str, operator: str = "") -> int:
    """Upgrade."""
    broken = Broken(name, UpgradeOptions(emulator=emulator), point, kind, operator, _transit)
    fault = broken.fault

    async def execute(original: Original, monitor: Monitor, command: str, *arguments: Any, **options: Any) -> Any:
        if broken.upgrade._first is None:
            return await original(monitor, command, *arguments, **options)
        return await fault.around(
            f"transit {command}",
            lambda: original(monitor, command, *arguments, **options),
            CommandError(command, "refused for a test"),
            MonitorTimeout(f"QEMU did not answer {command}, for a test"),
        )

    async def end(original: Original, *arguments: Any, **options: Any) -> None:
        await fault.around(
            "stream-end",
            lambda: original(*arguments, **options),
            StateError("cannot load the device state into the new QEMU: it stopped reading, for a test"),
            StateError("the destination did not take the device state, for a test"),
        )

    async def freeze(original: Original, *arguments: Any) -> bool:
        failure = ProcessError("not in time, for a test")
        try:
            return bool(await fault.around("halt", lambda: original(*arguments), failure, failure))
        except ProcessError:
            return False

    patched(Monitor, "execute", execute)
    patched(QemuProcess, "freeze", freeze)
    patched(OutgoingState, "end", end)
    return run(broken.upgrade)


def _transit(upgrade: Upgrade) -> int:
    """The pid of the transit, while the guest hops into it; 0 if there is none."""
    return 0 if upgrade._first is None else upgrade._first.report.destination_pid


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:6]))
