"""
The command line of a rehearsal: the domain's own devices, with backends that nobody else uses.

It is what libvirt would start the destination with (so options that the new emulator does not know any more are not in
it), changed so that it can be started beside the running guest and touches nothing of it:

=======================================  ===========================================================================
``-blockdev``                            for each disk a node without content, of the same size, writable or not as
                                         the disk is; everything below it is omitted
the first flash of an encrypted guest    the firmware itself, read only: QEMU does not start without what it looks up
                                         in there for the launch (entry of further processors, table of kernel hashes)
``-netdev`` of a tap, vhost              a tap in a network of its own, as many queues, no vhost
``-netdev user``                         the same without forwarded ports; it has a device state of its own
any other ``-netdev``                    a hub without other ports
``-chardev``, ``-serial``, ``-parallel`` ``null``
``-audiodev``                            ``none``
VNC, SPICE, monitors, pid file, secrets, omitted
TLS, throttling, inherited descriptors
=======================================  ===========================================================================

Network cards are taken from the source's command line, because libvirt's has placeholders for them; those that were
plugged or unplugged since are as QEMU reports them. A device that cannot be shared raises :exc:`Unrehearsable`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sevhop_qmp.errors import SevhopError

from ..guest.command_line import HOST_DEVICES, Option, parse, properties
from .present_cards import Cards, UnknownBackend, as_option

_OMITTED = frozenset(
    """
    add-fd blockdev daemonize debugcon display gdb incoming loadvm mon monitor msg pidfile qmp qmp-pretty S spice vnc
    """.split()
)
_NULL = frozenset({"serial", "parallel"})
_OMITTED_OBJECTS = re.compile(r"(secret|tls-|authz-|pr-manager-|throttle-group|input-|filter-)")
#: Files that libvirt writes only when it starts an SEV guest; the launch is not repeated.
_LAUNCH_FILES = ("session-file", "dh-cert-file")
#: What connects QEMU's user network with the host.
_PORTS = ("hostfwd", "guestfwd", "smb")
#: Backends that support virtio-net headers, which the guest's driver may have negotiated.
_WITH_HEADER = frozenset({"tap", "vhost-user", "vhost-vdpa"})
_PFLASH = re.compile(r"(?<=,)pflash(?P<unit>[01])=(?P<node>[^,]*)")


class Unrehearsable(SevhopError):
    """This guest has something that cannot be shared with a rehearsal."""


@dataclass(frozen=True)
class Disk:
    """A disk of the source: its size in bytes, and whether the guest may only read it."""

    size: int
    read_only: bool


@dataclass(frozen=True)
class Network:
    """A network backend that the rehearsal needs a tap for: its id, and the number of its queues."""

    name: str
    queues: int


@dataclass
class RehearsalCommandLine:
    """
    What a rehearsal QEMU is started with.

    :ivar arguments: without the program, and without its network backends.
    :ivar networks: those that need a tap; the others are among the arguments.
    """

    arguments: list[str] = field(default_factory=list)
    networks: list[Network] = field(default_factory=list)


def derive(
    destination: Sequence[str],
    source: Sequence[str],
    disks: Mapping[str, Disk],
    cards: Cards,
    *,
    encrypted: bool = False,
) -> RehearsalCommandLine:
    """
    Derive the arguments of a rehearsal.

    :param destination: arguments that libvirt would start the domain with, without its network interfaces.
    :param source: arguments of the source.
    :param disks: by the id of the device, and ``pflash0``, ``pflash1``.
    :param cards: of the source.
    :param encrypted: whether the guest has an SEV context.
    :raises Unrehearsable: one of them cannot be shared.
    """
    result = RehearsalCommandLine()
    nodes: dict[str, Disk] = {}
    firmware: list[dict[str, Any]] = []
    given = parse(list(destination))
    options = [option for option in given if option.name not in _OMITTED]
    try:
        options += cards.given(source, options)
        for card in cards.plugged:
            options += _plugged_card(card, cards)
    except UnknownBackend as err:
        raise Unrehearsable(err.message) from err
    for option in options:
        if option.name == "machine":
            for found in _PFLASH.finditer(option.value or ""):
                if encrypted and found["unit"] == "0":
                    firmware = _firmware(found["node"], given)
                else:
                    nodes[found["node"]] = _disk(disks, f"pflash{found['unit']}")
        elif option.name == "device":
            props = _device(option)
            if node := props.get("drive"):
                nodes[node] = _disk(disks, props.get("id", ""))
    for described in firmware + [_empty_node(name, disk) for name, disk in nodes.items()]:
        result.arguments += ["-blockdev", json.dumps(described)]
    for number, option in enumerate(options):
        result.arguments += _replaced(option, number, result.networks)
    result.arguments += ["-display", "none"]
    return result


def _replaced(option: Option, number: int, networks: list[Network]) -> list[str]:
    """
    Options of the rehearsal, for one of the destination.

    :param number: unique for each option.
    """
    props = properties(option.value or "")
    if option.name in ("drive", "tpmdev", "fsdev", "virtfs", "usbdevice", "hda", "hdb", "hdc", "hdd", "cdrom", ""):
        raise Unrehearsable(f"{option} cannot be shared")
    if option.name in ("net", "nic"):
        raise Unrehearsable(f"the network card of {option} has no backend of its own")
    if option.name in _NULL:
        return [f"-{option.name}", "null"]
    if option.name == "chardev":
        return ["-chardev", f"null,id={props.get('id', '')}"]
    if option.name == "audiodev":
        return ["-audiodev", f"none,id={props.get('id', '')}"]
    if option.name == "netdev":
        return _network_backend(option, props, number, networks)
    if option.name == "object":
        omitted = _OMITTED_OBJECTS.match(props.get("", props.get("qom-type", "")))
        return [] if omitted else _without(option, _LAUNCH_FILES).argv()
    return option.argv()


def _network_backend(option: Option, props: Mapping[str, str], number: int, networks: list[Network]) -> list[str]:
    name, kind = props.get("id", ""), props.get("", props.get("type", ""))
    if kind == "user":
        return _without(option, _PORTS).argv()
    if kind not in _WITH_HEADER:
        return ["-netdev", f"hubport,id={name},hubid={number}"]
    several = props.get("fds") or props.get("vhostfds")
    queues = several.count(":") + 1 if several else int(props.get("queues", "1"))
    networks.append(Network(name, queues))
    return []


def _without(option: Option, keys: tuple[str, ...]) -> Option:
    """The option without some of its keys."""
    value = option.value or ""
    if value.startswith("{"):
        tree = json.loads(value)
        value = json.dumps({key: content for key, content in tree.items() if key not in keys})
    else:
        value = ",".join(part for part in value.split(",") if part.partition("=")[0] not in keys)
    return Option(option.name, value)


def _device(option: Option) -> dict[str, str]:
    """:raises Unrehearsable: the device cannot be shared."""
    props = properties(option.value or "")
    driver = props.get("", props.get("driver", ""))
    if HOST_DEVICES.match(driver):
        raise Unrehearsable(f"the host device behind {driver} cannot be shared")
    if driver.startswith("qxl"):
        raise Unrehearsable(f"{driver} loads from its video memory, which a rehearsal does not have")
    return props


def _disk(disks: Mapping[str, Disk], name: str) -> Disk:
    try:
        return disks[name]
    except KeyError as err:
        raise Unrehearsable(f"the size of disk {name} is not known") from err


def _empty_node(name: str, disk: Disk) -> dict[str, Any]:
    return {
        "driver": "null-co",
        "node-name": name,
        "size": disk.size,
        "read-only": disk.read_only,
        "read-zeroes": True,
    }


def _firmware(name: str, options: list[Option]) -> list[dict[str, Any]]:
    """
    The nodes of a flash, each behind those that it refers to, and without a lock that the source would notice.

    :raises Unrehearsable: one of them is not known.
    """
    values = [option.value or "" for option in options if option.name == "blockdev"]
    nodes = {node.get("node-name"): node for node in (json.loads(value) for value in values if value.startswith("{"))}
    if name not in nodes:
        raise Unrehearsable(f"the firmware in {name} is not known")
    node = {key: value for key, value in nodes[name].items() if key != "auto-read-only"} | {"read-only": True}
    if node["driver"] == "file":
        node["locking"] = "off"
    below = [node[key] for key in ("file", "backing") if isinstance(node.get(key), str)]
    return [*(one for other in below for one in _firmware(other, options)), node]


def _plugged_card(card: Mapping[str, Any], cards: Cards) -> list[Option]:
    name, backend = cards.backend_of(card)
    value = f"{backend.kind},id={name}"
    if backend.kind in _WITH_HEADER:
        value += f",queues={backend.queues}"
    return [Option("netdev", value), as_option(card)]
