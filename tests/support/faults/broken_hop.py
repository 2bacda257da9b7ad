"""
A hop outside libvirt in which something goes wrong: run as a program, so that it may be killed. ::

    python -m tests.support.faults.broken_hop MONITOR EMULATOR POINT FAULT [OPERATOR]

It hops like ``sevhop hop``; see :mod:`.fault` for POINT and FAULT, and :mod:`.operator`. An action is a command that
it gives to a QEMU, or

``halt``        the source is halted
``stream-end``  the stream to the destination is closed
``end-source``  the source is killed, and seen to have ended

Exit status: that of ``sevhop hop``.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from sevhop.engine.hop import Hop
from sevhop.options import HopOptions
from sevhop_qmp.device_state import OutgoingState
from sevhop_qmp.errors import CommandError, MonitorTimeout, ProcessError, StateError
from sevhop_qmp.monitor import Monitor
from sevhop_qmp.process import QemuProcess

from .fault import Fault, patched, run
from .operator import Operator

#: While these points are passed, all that there is of the guest is in the source.
BEFORE_THE_STATE_IS_SAVED = (
    "phase acquire",
    "phase prepare",
    "after add-fd 0",
    "before x-sev-adopt-ram 0",
    "after x-sev-adopt-ram 0",
    "before migrate-incoming 0",
    "after migrate-incoming 0",
    "after add-fd 1",
    "phase stop",
    "before stop 0",
    "before xen-save-devices-state 0",
)
#: Where others can still do something to the guest, and it is seen.
OTHERS_CHANGE = ("phase acquire", "phase prepare", "after x-sev-adopt-ram 0", "after migrate-incoming 0", "phase stop")
#: And where they can have a guest run that was stopped.
OTHERS_CONTINUE = (*OTHERS_CHANGE, "after stop 0", "phase map", "phase save", "phase load", "before halt 0")
#: Then its state and its private RAM blocks are being read, and it is a matter of a millisecond whether all of it was.
BEING_SAVED = (
    "after stop 0",
    "phase map",
    "after xen-save-devices-state 0",
    "phase save",
)
#: And from here on in the destination, too.
SAVED = (
    "phase load",
    "before halt 0",
    "after halt 0",
    "before stream-end 0",
)
#: The destination has all that it needs, and lets the guest run as soon as it has loaded it.
LOADING = ("after stream-end 0",)
#: From here on it runs there.
RUNNING = (
    "phase commit",
    "phase resume",
    "phase finish",
    "before end-source 0",
    "after end-source 0",
    "before x-sev-adopt-finish 0",
    "after x-sev-adopt-finish 0",
)


def main(monitor: str, emulator: str, point: str, kind: str, operator: str = "") -> int:
    """Hop."""
    fault = Fault(
        point,
        kind,
        {"source": lambda: hop.report.source_pid, "destination": lambda: hop.report.destination_pid},
        Operator.parsed(operator).at if operator else lambda _: None,
    )
    hop = Hop(Path(monitor), HopOptions(emulator=emulator, start_timeout=60.0), fault.heard)

    async def execute(
        original: Callable[..., Awaitable[Any]], monitor: Monitor, command: str, *arguments: Any, **options: Any
    ) -> Any:
        if threading.current_thread() is not threading.main_thread():
            return await original(monitor, command, *arguments, **options)  # the operator's
        return await fault.around(
            command,
            lambda: original(monitor, command, *arguments, **options),
            CommandError(command, "refused for a test"),
            MonitorTimeout(f"QEMU did not answer {command}, for a test"),
        )

    async def end(original: Callable[..., Awaitable[None]], *arguments: Any, **options: Any) -> None:
        await fault.around(
            "stream-end",
            lambda: original(*arguments, **options),
            StateError("cannot load the device state into the new QEMU: it stopped reading, for a test"),
            StateError("the destination did not take the device state, for a test"),
        )

    async def freeze(original: Callable[..., Awaitable[bool]], *arguments: Any) -> bool:
        return await unless_faulty("halt", lambda: original(*arguments))

    async def wait(original: Callable[..., Awaitable[bool]], process: QemuProcess, timeout: float) -> bool:
        if process.pid != hop.report.source_pid:
            return await original(process, timeout)
        return await unless_faulty("end-source", lambda: original(process, timeout))

    async def unless_faulty(action: str, do: Callable[[], Awaitable[bool]]) -> bool:
        failure = ProcessError("not in time, for a test")
        try:
            return await fault.around(action, do, failure, failure)
        except ProcessError:
            return False

    patched(Monitor, "execute", execute)
    patched(QemuProcess, "freeze", freeze)
    patched(QemuProcess, "wait", wait)
    patched(OutgoingState, "end", end)
    return run(hop)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:6]))
