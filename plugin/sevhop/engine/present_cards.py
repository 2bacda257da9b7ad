"""
The network cards that a domain has now, as options. libvirt's command line for another QEMU has only placeholders for
them, so those that the guest was started with are taken from the source's command line, without those that were
unplugged; those that were plugged since are as QEMU reports them.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sevhop_qmp.errors import SevhopError
from sevhop_qmp.monitor import Commands

from ..disks import devices
from ..guest import emulator
from ..guest.command_line import Option, parse, properties

#: A backend in what ``info network`` prints, once for each of its queues.
_BACKEND = re.compile(
    r"^ \\ (?P<name>[^:]+): index=(?P<index>\d+),type=(?P<kind>[^,\r\n]+)(?:,fd=(?P<descriptor>\d+))?", re.MULTILINE
)


class UnknownBackend(SevhopError):
    """QEMU does not report enough of a network card's backend."""


@dataclass(frozen=True)
class Backend:
    """
    The network backend of a card: its type, as ``-netdev`` has it, and the number of its queues.

    :ivar descriptors: of a tap that QEMU was given: their numbers in the source, one for each queue.
    """

    kind: str
    queues: int = 1
    descriptors: tuple[int, ...] = ()


@dataclass(frozen=True)
class Cards:
    """
    The network cards that a source has now.

    :ivar devices: the ids of all devices that it was started with and still has.
    :ivar plugged: the cards that were plugged since, each as ``-device`` takes it.
    :ivar backends: theirs, by id.
    """

    devices: frozenset[str]
    plugged: Sequence[Mapping[str, Any]] = ()
    backends: Mapping[str, Backend] = field(default_factory=dict)

    def given(self, source: Sequence[str], others: Sequence[Option]) -> list[Option]:
        """
        Those of the source's command line that it still has, each with its backend in front of it.

        :param source: its arguments.
        :param others: the options of another command line; devices that are in there are not repeated.
        :raises UnknownBackend: one has no backend there.
        """
        known = {properties(option.value or "").get("id") for option in others if option.name == "device"}
        options = parse(list(source))
        backends = {properties(option.value or "").get("id"): option for option in options if option.name == "netdev"}
        cards = []
        for option in options:
            props = properties(option.value or "")
            if option.name == "device" and props.get("id") not in known and (name := props.get("netdev")):
                if "id" in props and props["id"] not in self.devices:
                    continue  # it was unplugged
                if name not in backends:
                    raise UnknownBackend(f"there is no network backend {name}")
                cards += [backends[name], option]
        return cards

    def backend_of(self, card: Mapping[str, Any]) -> tuple[str, Backend]:
        """
        Id and kind of the backend of a card that was plugged.

        :raises UnknownBackend: QEMU does not report it.
        """
        name = str(card.get("netdev", ""))
        if name not in self.backends:
            raise UnknownBackend(f"the network card {card['id']} was plugged, and its backend is not known")
        return name, self.backends[name]


def as_option(card: Mapping[str, Any]) -> Option:
    """``-device`` of a card that was plugged."""
    return Option("device", json.dumps(dict(card)))


async def read(monitor: Commands, arguments: Sequence[str], program: str) -> Cards:
    """
    Read the cards of a source.

    :param arguments: its own, without the program.
    :param program: the QEMU that they are wanted for.
    :raises SevhopError: QEMU does not answer.
    """
    present = await devices.read(monitor)
    plugged = await devices.plugged(monitor, arguments, present, devices.CARDS)
    backends: dict[str, Backend] = {}
    if plugged:
        drivers = {str(card["driver"]) for card in plugged}
        known = await asyncio.to_thread(emulator.properties, program, drivers)
        plugged = devices.without_unknown(plugged, known)
        backends = backends_in(str(await monitor.hmp("info network")))
    return Cards(frozenset(device.name for device in present.values() if not device.plugged), plugged, backends)


def backends_in(text: str) -> dict[str, Backend]:
    """The backends in the output of ``info network``, by id."""
    found: dict[str, Backend] = {}
    for row in _BACKEND.finditer(text):
        before = found.get(row["name"], Backend("", 0)).descriptors
        mine = (int(row["descriptor"]),) if row["descriptor"] else ()
        found[row["name"]] = Backend(row["kind"], int(row["index"]) + 1, before + mine)
    return found
