"""SEV-ES guests outside the lab, and the flag for which QEMU leaves their vCPU state alone."""

from __future__ import annotations

import asyncio
from pathlib import Path

from sevhop.checks import registers
from sevhop.checks.result import Status
from sevhop.guest import inspection, runtime_settings
from sevhop_qmp.monitor import Monitor
from sevhop_qmp.process import QemuProcess

from tests.support.guests.running import ANSWER_TIMEOUT

#: :mod:`tests.support.faults.broken_hop`, on a host that is no SEV host and would be refused.
BROKEN_HOP = """
import sys
from sevhop.checks import sev_host
from tests.support.faults import broken_hop
sev_host.examine = lambda *_, **__: []
sys.exit(broken_hop.main(*sys.argv[1:]))
"""


def assert_can_hop_again(monitor: Path) -> int:
    """
    The test that QEMU can save all vCPU state of the guest passes. It fails if a hop has left the flag cleared.

    :return: the offset of the flag; 0 if this QEMU has none.
    """

    async def examine() -> registers.Registers:
        async with await Monitor.connect(monitor, timeout=ANSWER_TIMEOUT) as connected:
            process = QemuProcess.open(connected.peer)
            try:
                return await registers.examine(await inspection.inspect(connected, process), process, connected)
            finally:
                process.close()

    found = asyncio.run(examine())
    assert found.result is not None, "it is no SEV-ES guest"
    assert found.result.status is Status.PASS, found.result
    return found.flag


def reboot_action_of(pid: int) -> str:
    """What a QEMU does when its guest reboots."""
    process = QemuProcess.open(pid)
    try:
        return runtime_settings.actions(process)["reboot"]
    finally:
        process.close()
