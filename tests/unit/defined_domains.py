"""A libvirt that has definitions of domains, in the place of the real one below :mod:`sevhop.libvirt.connection`."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import libvirt
from sevhop.libvirt.connection import Connection

#: Machine types by their aliases.
ALIASES = {"q35": "pc-q35-7.2", "pc": "pc-i440fx-7.2"}
PASSWORD = " passwd='hunter2'"


class FakeLibvirt(libvirt.libvirtError):  # type: ignore[misc]
    """An error with a code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.err = (code, 0, message, 0, "", None, None, 0, 0)


@dataclass
class FakeDomain:
    """
    A domain that is off.

    :ivar defined: its definition, with passwords.
    :ivar on_read: called with the number of times that the definition was read with its passwords, before it is.
    """

    title: str
    defined: str
    persistent: bool = True
    left_alone: tuple[int, ...] = ()
    saved: bool = False
    reads: int = 0
    on_read: Callable[[int], None] = lambda _: None
    identity: str = field(default_factory=lambda: str(uuid.uuid4()))

    def name(self) -> str:
        return self.title

    def UUIDString(self) -> str:
        return self.identity

    def isActive(self) -> int:
        return 0

    def isPersistent(self) -> int:
        return int(self.persistent)

    def hasManagedSaveImage(self) -> int:
        return int(self.saved)

    def metadata(self, _: int, __: str, flags: int) -> str:
        if flags in self.left_alone:
            return "<leave-alone/>"
        raise FakeLibvirt("no metadata", libvirt.VIR_ERR_NO_DOMAIN_METADATA)

    def XMLDesc(self, flags: int) -> str:
        assert flags & libvirt.VIR_DOMAIN_XML_INACTIVE
        if flags & libvirt.VIR_DOMAIN_XML_SECURE:
            self.reads += 1
            self.on_read(self.reads)
            return self.defined
        return self.defined.replace(PASSWORD, "")


class FakeDaemon:
    """The daemon. :ivar defines: how often a definition was replaced."""

    def __init__(self, *domains: FakeDomain) -> None:
        self.domains = {domain.title: domain for domain in domains}
        self.defines = 0

    def connection(self) -> Connection:
        """A connection to it."""
        return Connection(self, "qemu:///system")

    def lookupByName(self, name: str) -> FakeDomain:
        if name not in self.domains:
            raise FakeLibvirt("no domain with matching name", libvirt.VIR_ERR_NO_DOMAIN)
        return self.domains[name]

    def listAllDomains(self, _: int) -> list[FakeDomain]:
        return list(self.domains.values())

    def defineXML(self, xml: str) -> None:
        self.defines += 1
        name = xml.partition("<name>")[2].partition("</name>")[0]
        self.domains[name].defined = xml

    def getDomainCapabilities(self, _: object, __: object, machine: str, *___: object) -> str:
        return f"<domainCapabilities><machine>{ALIASES.get(machine, machine)}</machine></domainCapabilities>"

    def close(self) -> None:
        """Nothing is open."""


def connect(daemon: FakeDaemon, monkeypatch: Any) -> None:
    """Have every connection go to a daemon."""

    async def opened(*_: object, **__: object) -> Connection:
        return daemon.connection()

    monkeypatch.setattr(Connection, "open", opened)
