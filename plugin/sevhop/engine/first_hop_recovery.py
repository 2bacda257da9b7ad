"""
Recover the first hop of an upgrade by way of a transit: see :mod:`sevhop.engine.domain_recovery`.

It is a hop like one outside libvirt, and the same is decided (:mod:`sevhop.engine.hop_recovery`). But the source is
reached through libvirt; and when the guest is in the transit, libvirt's part of the upgrade is still to be done
(:mod:`sevhop.engine.transit_recovery`).
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

from sevhop_qmp import adopt
from sevhop_qmp.errors import SevhopError
from sevhop_qmp.monitor import SourceMonitor
from sevhop_qmp.process import QemuProcess

from ..libvirt.connection import Connection
from ..libvirt.source_monitor import DomainSourceMonitor
from ..records.hop_record import HopRecord
from .hop_recovery import InterruptedHop
from .interrupted_qemu import NewQemu, OldQemu
from .realtime_reset import reset_boosted
from .recovery_result import RecoveredGuest, RecoveryOutcome
from .transit import remove_confinement


async def settle(record: HopRecord, connection: Connection, *, timeout: float) -> RecoveredGuest:
    """
    Finish the hop into the transit, or roll it back.

    :param timeout: seconds for each step.
    :return: ``DESTINATION`` if the guest is in the transit. The source is left halted then.
    :raises SevhopError: that is not possible now, or needs manual action.
    """
    source = record.source.open()
    transit = record.transit.open() if record.transit else None
    for one in (source, transit):
        if one is not None:
            reset_boosted(one.threads)
    try:
        old = DomainQemu(source, record, connection, timeout)
        new = NewQemu(transit, Path(record.transit_directory), timeout)
        # The phases after it are those of the upgrade. What may be, may be in its last one.
        phase = "finish" if record.committed else record.phase
        recovered = await InterruptedFirstHop(old, new, timeout).settle(replace(record, phase=phase))
    finally:
        for one in (source, transit):
            if one is not None:
                one.close()
    if recovered.result is not RecoveryOutcome.DESTINATION:
        await remove_confinement(record.cgroups, record.apparmor_profile)
    return recovered


class DomainQemu(OldQemu):
    """A source that libvirt still has."""

    def __init__(self, process: QemuProcess | None, record: HopRecord, connection: Connection, timeout: float) -> None:
        super().__init__(process, "", record.run_mark, timeout)
        self._uuid = record.uuid
        self._connection = connection
        self._opened = contextlib.AsyncExitStack()

    async def _connect(self, process: QemuProcess) -> SourceMonitor:
        domain = await self._connection.domain_with(self._uuid)
        if domain is None or domain.living_pid() != process.pid:
            raise SevhopError(f"process {process.pid} is not the QEMU that libvirt has", "see virsh list")
        opened = DomainSourceMonitor.opened(self._connection, domain, process, self._timeout)
        return await self._opened.enter_async_context(opened)

    async def close(self) -> None:
        """Hang up."""
        await super().close()
        await self._opened.aclose()


class InterruptedFirstHop(InterruptedHop):
    """The domain's QEMU and the transit, of a hop whose command has exited."""

    async def _complete(self, record: HopRecord, notes: list[str]) -> None:
        await self._old.halt()
        transit = await self._new.take()
        try:
            transit.protect(record.oom_score_adj, notes.append)
            await adopt.finish(transit.monitor)
        finally:
            await transit.monitor.close()  # the process is still needed, and the caller's
