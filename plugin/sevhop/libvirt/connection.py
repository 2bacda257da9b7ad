"""The few calls to the libvirt daemon that sevhop makes: domains, emulators, restoring."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import libvirt

from .daemon import NO_DOMAIN, RESTORE_TIMEOUT, Daemon, DomainError
from .domain import Domain

#: Base label of the security model "dac" in the daemon's capabilities: numbers, after a plus sign.
_DAC_LABEL = re.compile(r"\+(?P<uid>\d+):\+(?P<gid>\d+)")
_UUID = re.compile("[0-9a-fA-F]{8}(?:-?[0-9a-fA-F]{4}){3}-?[0-9a-fA-F]{12}")
#: Ids of domains are below that (``int``).
_IDS = 1 << 31
_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")


class Connection(Daemon):
    """A connection to the libvirt daemon of this host. Use :meth:`open`."""

    async def qemu_user(self) -> tuple[int, int]:
        """
        User and group that QEMU runs as unless a domain has its own; root's where the daemon reports none.

        The first time the daemon probes all emulators for that.
        """
        capabilities = ElementTree.fromstring(await self.call(self.raw.getCapabilities, timeout=RESTORE_TIMEOUT))
        for model in capabilities.iterfind("host/secmodel"):
            label = _DAC_LABEL.fullmatch(model.findtext("baselabel") or "")
            if model.findtext("model") == "dac" and label:
                return int(label["uid"]), int(label["gid"])
        return 0, 0

    async def domain(self, name: str) -> Domain:
        """:raises DomainError: there is no such domain."""
        return Domain(self, await self.call(self.raw.lookupByName, name))

    async def look_up(self, text: str) -> Domain:
        """
        A domain as virsh looks it up: by its id, its UUID, or its name, in this order.

        :raises DomainError: there is no such domain.
        """
        ways: list[tuple[Callable[[Any], Any], Any]] = [(self.raw.lookupByName, text)]
        if _UUID.fullmatch(text):
            ways.insert(0, (self.raw.lookupByUUIDString, text))
        if text.isascii() and text.isdecimal() and int(text) < _IDS:
            ways.insert(0, (self.raw.lookupByID, int(text)))
        for function, key in ways[:-1]:
            try:
                return Domain(self, await self.call(function, key))
            except DomainError as err:
                if err.code != NO_DOMAIN:
                    raise
        function, key = ways[-1]
        try:
            return Domain(self, await self.call(function, key))
        except DomainError as err:
            if err.code != NO_DOMAIN:
                raise
            raise DomainError(err.message, err.code, "see: virsh list --all") from err

    async def domain_with(self, uuid: str) -> Domain | None:
        """
        The domain with a UUID, whatever it is called; None if the daemon knows none.

        :raises DomainError: the daemon does not answer.
        """
        try:
            return Domain(self, await self.call(self.raw.lookupByUUIDString, uuid))
        except DomainError as err:
            if err.code == NO_DOMAIN:
                return None
            raise

    async def domains(self) -> list[Domain]:
        """The active ones, by name."""
        found = await self.call(self.raw.listAllDomains, libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
        return sorted((Domain(self, raw) for raw in found), key=lambda domain: domain.name)

    async def all_domains(self) -> list[Domain]:
        """Those that it knows, active or not."""
        return [Domain(self, raw) for raw in await self.call(self.raw.listAllDomains, 0)]

    async def default_emulator(self) -> tuple[str, str]:
        """
        The daemon's default for a new domain: its type (``kvm`` or ``qemu``), and the emulator.

        :raises DomainError: it has no emulator.
        """
        text = await self.call(self.raw.getDomainCapabilities, None, None, None, None, 0, timeout=RESTORE_TIMEOUT)
        found = ElementTree.fromstring(text)
        return found.findtext("domain", ""), found.findtext("path", "")

    async def probe_capabilities(self, emulator: str, arch: str, machine: str, kind: str) -> None:
        """
        Have the daemon probe an emulator, and cache the result. That takes seconds the first time, which would
        otherwise be downtime.

        :raises DomainError: it is no emulator for such a domain.
        """
        await self.call(self.raw.getDomainCapabilities, emulator, arch, machine, kind, 0, timeout=RESTORE_TIMEOUT)

    async def machine_type(self, emulator: str, arch: str, machine: str, kind: str) -> str:
        """
        The machine type that a name is in an emulator; another one if the name is an alias.

        :raises DomainError: it is no emulator for such a domain.
        """
        arguments = (emulator or None, arch or None, machine, kind, 0)
        text = await self.call(self.raw.getDomainCapabilities, *arguments, timeout=RESTORE_TIMEOUT)
        return ElementTree.fromstring(text).findtext("machine", "") or machine

    async def command_line(self, xml: str) -> tuple[dict[str, str], list[str]]:
        """
        The command line that the daemon would start a domain with: environment, and the emulator with its arguments.

        The XML must have no network interfaces: libvirt converts them here, and creates tap devices for them.

        :raises DomainError: it cannot be started at all.
        """
        text = await self.call(self.raw.domainXMLToNative, "qemu-argv", xml, 0, timeout=RESTORE_TIMEOUT)
        argv = shlex.split(text)
        first = next(number for number, argument in enumerate(argv) if not _ASSIGNMENT.match(argument))
        return dict(variable.split("=", 1) for variable in argv[:first]), argv[first:]

    async def restore(self, image: str, timeout: float | None = None) -> None:
        """
        Restore a saved domain.

        :param timeout: seconds, if not those of the connection: more where the guest runs meanwhile.
        :raises DomainError: it failed; the image is still there.
        :raises DomainTimeout: libvirt is still at it.
        """
        await self.call(self.raw.restore, image, timeout=timeout)

    async def define(self, xml: str) -> None:
        """Replace the persistent definition of a domain."""
        await self.call(self.raw.defineXML, xml)
