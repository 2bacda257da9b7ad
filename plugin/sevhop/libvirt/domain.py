"""The calls of libvirt's that concern one domain."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import libvirt

from .daemon import CALL_TIMEOUT, NO_DOMAIN, RECONNECT_TIMEOUT, RESTART, RESTORE_TIMEOUT, Daemon, DomainError
from .domain_monitor import DomainMonitor

#: Where the daemon of the system keeps the pid of each QEMU.
_PID_FILES = Path("/run/libvirt/qemu")
#: A URI at which there is no daemon.
_NOWHERE = "qemu+unix:///system?socket=/dev/null"
_POLL = 0.001
#: The channel by which libvirt reaches the guest agent.
_AGENT = "org.qemu.guest_agent.0"
#: XML namespace of our element in the metadata of domains. It is a name, not an address.
METADATA = "urn:sevhop:domain"
#: libvirt's errors for a domain that has no QEMU, or was transient and is gone with it.
_OFF = (libvirt.VIR_ERR_OPERATION_INVALID, NO_DOMAIN)


class Domain:
    """
    One domain.

    :ivar name: unique in its daemon.
    """

    def __init__(self, connection: Daemon, raw: Any) -> None:
        self._connection = connection
        self._raw = raw
        self.name: str = raw.name()
        self.uuid: str = raw.UUIDString()

    @property
    def raw(self) -> Any:
        """libvirt's own object, another one after a lost connection."""
        return self._raw

    async def reconnect(self, patience: float = RECONNECT_TIMEOUT) -> bool:
        """
        Connect again if the daemon was restarted; until then every call fails.

        :return: whether it was.
        :raises DomainError: it is not back in time, or does not know the domain any more.
        """
        lost = await self._connection.reconnect(patience)
        if lost:
            self._raw = await self._connection.call(self._connection.raw.lookupByUUIDString, self.uuid)
        return lost

    async def active(self) -> bool:
        """Whether it has a QEMU. A transient domain is unknown when that has exited."""
        try:
            return bool(await self._connection.call(self._raw.isActive))
        except DomainError as err:
            if err.code == NO_DOMAIN:
                return False
            raise

    async def is_left_alone(self, *, defined: bool = False) -> bool:
        """
        Whether its owner has opted out of upgrades of all domains, by an element in its metadata.

        :param defined: in its persistent definition, which it has, instead of the running domain.
        """
        kind = libvirt.VIR_DOMAIN_METADATA_ELEMENT
        flags = libvirt.VIR_DOMAIN_AFFECT_CONFIG if defined else libvirt.VIR_DOMAIN_AFFECT_CURRENT
        try:
            found = await self._connection.call(self._raw.metadata, kind, METADATA, flags)
        except DomainError as err:
            if err.code == libvirt.VIR_ERR_NO_DOMAIN_METADATA:
                return False
            raise
        return ElementTree.fromstring(found).tag.rpartition("}")[2] == "leave-alone"

    async def persistent(self) -> bool:
        """Whether it stays defined without a QEMU."""
        return bool(await self._connection.call(self._raw.isPersistent))

    async def running(self) -> bool:
        """Whether its guest runs."""
        state, _ = await self._connection.call(self._raw.state)
        return bool(state in (libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_BLOCKED))

    async def saved(self) -> bool:
        """Whether its QEMU has exited because the guest was saved."""
        state, reason = await self._connection.call(self._raw.state)
        return bool((state, reason) == (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_SAVED))

    async def destroyed(self) -> bool:
        """Whether it is off because a client has destroyed it."""
        state, reason = await self._connection.call(self._raw.state)
        return bool((state, reason) == (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED))

    async def stopped_by_itself(self) -> bool:
        """Whether it is off, and nobody has destroyed, saved or migrated it. One that somebody could not start is."""
        state, reason = await self._connection.call(self._raw.state)
        others = (
            libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED,
            libvirt.VIR_DOMAIN_SHUTOFF_MIGRATED,
            libvirt.VIR_DOMAIN_SHUTOFF_SAVED,
            libvirt.VIR_DOMAIN_SHUTOFF_FROM_SNAPSHOT,
        )
        return bool(state == libvirt.VIR_DOMAIN_SHUTOFF and reason not in others)

    async def start(self) -> None:
        """
        Start it from a cold start.

        :raises DomainError: libvirt refuses, also if it is active.
        """
        await self._connection.call(self._raw.create, timeout=RESTORE_TIMEOUT)

    async def managed_save(self) -> bool:
        """Whether libvirt keeps a saved state of it for the next start."""
        return bool(await self._connection.call(self._raw.hasManagedSaveImage))

    async def snapshots_and_checkpoints(self) -> tuple[int, int]:
        """Their numbers, as libvirt has them."""
        checkpoints = await self._connection.call(self._raw.listAllCheckpoints)
        return int(await self._connection.call(self._raw.snapshotNum)), len(checkpoints)

    async def autodestroy(self) -> bool:
        """
        Whether libvirt destroys it when the client that started it disconnects. No call reports that, but libvirt
        migrates no such domain, and checks that first; no daemon is at the URI, so the migration fails in any case.
        """
        flags = libvirt.VIR_MIGRATE_PEER2PEER | libvirt.VIR_MIGRATE_LIVE
        try:
            await self._connection.call(self._raw.migrateToURI3, _NOWHERE, {}, flags)
        except DomainError as err:
            return "auto destroy" in err.message
        return False

    async def job(self) -> bool:
        """Whether a job of libvirt's is in progress on it."""
        return bool((await self._connection.call(self._raw.jobInfo))[0] != libvirt.VIR_DOMAIN_JOB_NONE)

    async def xml(self) -> str:
        """As it runs, in the form of a save image."""
        flags = libvirt.VIR_DOMAIN_XML_SECURE | libvirt.VIR_DOMAIN_XML_MIGRATABLE
        return str(await self._connection.call(self._raw.XMLDesc, flags))

    async def live_xml(self) -> str:
        """As it runs, with what libvirt has chosen for it."""
        return str(await self._connection.call(self._raw.XMLDesc, 0))

    async def inactive_xml(self, *, secure: bool = True) -> str:
        """
        As it will start the next time.

        :param secure: with passwords, without which it cannot be defined again. Without them it may be shown.
        """
        flags = libvirt.VIR_DOMAIN_XML_INACTIVE | (libvirt.VIR_DOMAIN_XML_SECURE if secure else 0)
        return str(await self._connection.call(self._raw.XMLDesc, flags))

    async def descriptions(self) -> list[str]:
        """All of its XML that libvirt has: of the saved state, the snapshots, as it will start, and as it runs."""
        # In this order: a state is removed when the domain runs from it.
        call, texts = self._connection.call, []
        try:
            if await self.managed_save():
                texts.append(str(await call(self._raw.managedSaveGetXMLDesc, 0)))
            texts += [str(await call(one.getXMLDesc, 0)) for one in await call(self._raw.listAllSnapshots)]
            return [*texts, await self.inactive_xml(), await self.live_xml()]
        except DomainError as err:
            if err.code == NO_DOMAIN:
                return []
            raise

    async def suspend(self) -> None:
        """Stop the guest. libvirt may wait for its own jobs, and one that timed out here must not be executed later."""
        await self._connection.call(self._raw.suspend, timeout=max(CALL_TIMEOUT, self._connection.timeout))

    async def resume(self) -> None:
        """Resume the guest."""
        await self._connection.call(self._raw.resume)

    async def has_agent(self) -> bool | None:
        """Whether its guest agent is connected; None if it has no channel for one."""
        for target in ElementTree.fromstring(await self.live_xml()).iterfind("devices/channel/target"):
            if target.get("name") == _AGENT:
                return target.get("state") == "connected"
        return None

    async def synchronize_clock(self, timeout: float) -> None:
        """
        Have the guest agent set the guest's clock by its real-time clock, which does not stop.

        :param timeout: seconds.
        :raises DomainError: libvirt or the agent refuses, or does not answer in time.
        """
        await self._connection.call(self._raw.setTime, None, libvirt.VIR_DOMAIN_TIME_SYNC, timeout=timeout)

    async def destroy(self) -> None:
        """Have libvirt clean up after a QEMU; one that still runs is killed. libvirt may be restarted meanwhile."""
        try:
            await self._connection.call(self._raw.destroy)
        except DomainError as err:
            if err.code not in _OFF:
                try:
                    if not await self.reconnect():
                        raise
                    await self._connection.call(self._raw.destroy)
                except DomainError as again:
                    if again.code not in _OFF:
                        raise
        # libvirt may be cleaning up already, since QEMU has exited. Its last step makes the domain inactive.
        deadline = time.monotonic() + self._connection.timeout
        while await self.active():
            if time.monotonic() > deadline:
                raise DomainError(
                    f"libvirt reports domain {self.name} as active although its QEMU has exited", hint=RESTART
                )
            await asyncio.sleep(_POLL)

    async def monitor(self) -> DomainMonitor:
        """:raises SevhopError: it does not answer."""
        monitor = DomainMonitor(lambda: self._raw, self.name, lambda: self._connection.timeout)
        await monitor.greet()
        return monitor

    def pid(self) -> int:
        """
        The pid of its QEMU.

        :raises DomainError: it cannot be found.
        """
        pid = self._last_pid()
        if not self._is_its_qemu(pid):
            raise DomainError(
                f"process {pid} is not the QEMU of domain {self.name}", hint="see virsh list, and try again"
            )
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
            reason = (err.strerror if isinstance(err, OSError) else "") or "there is no pid in it"
            message = f"cannot find the QEMU process of domain {self.name}: {_PID_FILES / self.name}.pid: {reason}"
            raise DomainError(message, hint="see virsh list, and try again") from err

    def _is_its_qemu(self, pid: int) -> bool:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            return self.uuid.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return False
