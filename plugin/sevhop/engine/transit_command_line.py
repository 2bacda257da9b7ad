"""
The command line of a transit: the domain's own devices with its own disks and networks, outside libvirt.

It is what libvirt would start the destination with (so options that the new emulator does not know any more are not in
it), changed so that the guest finds everything that it had, and libvirt and clients find nothing twice:

=======================================  ===========================================================================
``-blockdev``                            the same, but opened for writing at once if the disk is: with
                                         ``auto-read-only`` QEMU opens it again by its path, and by then libvirt may
                                         have taken the file from QEMU's user
``-netdev`` of a tap                     duplicates of the source's descriptors; adopt.so defers what QEMU sets
                                         (``qmp_ext/adopt/taps.c``). Without vhost-net: QEMU moves the packets, and
                                         offers the guest all that the kernel does
``-netdev user``                         the same
``-chardev file``                        the same file, opened here, to be appended to
any other ``-chardev``                   a file that nobody reads; with ``null`` the guest's ports would be disconnected
a log of a chardev                       as a file
secrets                                  the source's, since libvirt makes new ones, with another key
``-object sev-guest``                    the same, but with the source's files of its owner
``-audiodev``                            ``none``
displays, monitors, pid file             omitted
=======================================  ===========================================================================

What has a server, or is a property of the interface or process that libvirt takes back with the old QEMU, cannot be
carried: :exc:`Untransitable`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from sevhop_qmp.errors import SevhopError

from ..guest.command_line import HOST_DEVICES, Option, parse
from .present_cards import Backend, Cards, UnknownBackend, as_option

_OMITTED = frozenset(
    """
    add-fd daemonize debugcon display gdb incoming loadvm mon monitor msg nographic pidfile qmp qmp-pretty S vnc
    """.split()
)
#: Options that make a backend of their own, which two QEMUs cannot have.
_NOT_SHARED = frozenset("drive tpmdev fsdev virtfs usbdevice hda hdb hdc hdd cdrom net nic serial parallel".split())
#: Objects that the guest does not see, and that belong to one QEMU.
_OMITTED_OBJECTS = ("input-",)
_SECRETS = ("secret", "secret_keyring")
#: Of a sev-guest object: what its owner has prepared for the launch.
_OWNERS_FILES = ("dh-cert-file", "session-file")
_REFUSED_OBJECTS = {
    "filter-": "a filter of a network card",
    "pr-manager-": "a manager of reservations, whose helper exits with the old QEMU",
    "rng-egd": "a source of entropy with a server",
    "colo-": "a replication of the guest",
    "memory-backend-file": "memory in a file",
}
_REFUSED_DEVICES = re.compile(r"(qxl|usb-redir$|ccid-card-|ivshmem|virtio-mem-|virtio-pmem|nvdimm$|pc-dimm$|tpm-)")
#: What the guest's agent is connected to, whoever is at the other end.
_NOWHERE = "/dev/null"
#: Numbers of the fd sets of log files: none that libvirt or a client would use.
_FIRST_FDSET = 9000


class Untransitable(SevhopError):
    """This guest has something that a transit cannot carry."""


class Descriptors(Protocol):
    """Descriptors that the transit inherits."""

    def duplicate(self, number: int) -> int:
        """A duplicate of one of the source's; its number in the transit."""

    def appending(self, path: str) -> int:
        """A file that is appended to; its number in the transit."""


def derive(destination: Sequence[str], source: Sequence[str], cards: Cards, descriptors: Descriptors) -> list[str]:
    """
    Derive the arguments of a transit.

    :param destination: arguments that libvirt would start the domain with, without its network interfaces.
    :param source: arguments of the source.
    :param cards: of the source.
    :raises Untransitable: it cannot carry one of them.
    """
    return _Derivation(destination, source, cards, descriptors).arguments()


class _Derivation:
    def __init__(
        self, destination: Sequence[str], source: Sequence[str], cards: Cards, descriptors: Descriptors
    ) -> None:
        options = parse(list(destination))
        monitors = {option.properties().get("chardev") for option in options if option.name == "mon"}
        self._options = [
            option
            for option in options
            if option.name not in _OMITTED
            and not (option.name == "chardev" and option.properties().get("id") in monitors)
        ]
        self._source = list(source)
        self._cards = cards
        self._descriptors = descriptors
        self._logs = 0

    def arguments(self) -> list[str]:
        tops = _users_of(self._options)
        result: list[str] = []
        for option in self._options:
            result += self._replaced(option, tops)
        result += self._network_cards()
        return [*result, "-display", "none"]

    def _replaced(self, option: Option, tops: Mapping[str, Mapping[str, Any]]) -> list[str]:
        if option.name in _NOT_SHARED or option.name == "":
            raise Untransitable(f"{option} cannot be shared")
        if option.name == "spice":
            raise Untransitable("a SPICE display has a state of its own")
        if option.name == "netdev":
            return self._backend(option)
        if option.name == "blockdev":
            return _disk(option, tops)
        if option.name == "chardev":
            return self._character_device(option.properties())
        if option.name == "audiodev":
            return ["-audiodev", f"none,id={option.properties().get('id', '')}"]
        if option.name == "object":
            return self._object(option)
        if option.name == "device":
            _verify_device(option)
        return option.argv()

    # -- objects -----------------------------------------------------------------------------------

    def _object(self, option: Option) -> list[str]:
        props = option.properties()
        kind, name = props.get("", props.get("qom-type", "")), props.get("id", "")
        for prefix, what in _REFUSED_OBJECTS.items():
            if kind.startswith(prefix):
                raise Untransitable(f"{what} ({name}) cannot be shared")
        if kind in _SECRETS:
            found = self._source_object(name)
            if found is None:
                raise Untransitable(f"the secret {name} was added since the start")
            return found.argv()
        if kind == "sev-guest":
            found = self._source_object(name)
            theirs = {} if found is None else found.properties()
            for key in _OWNERS_FILES:
                if key in props and key in theirs:
                    option = option.without(key).with_property(key, theirs[key])
            return option.argv()
        return [] if kind.startswith(_OMITTED_OBJECTS) else option.argv()

    def _source_object(self, name: str) -> Option | None:
        for one in parse(self._source):
            if one.name == "object" and one.properties().get("id") == name:
                return one
        return None

    # -- character devices -------------------------------------------------------------------------

    def _character_device(self, props: Mapping[str, str]) -> list[str]:
        kind, name = props.get("", props.get("backend", "")), props.get("id", "")
        if not kind or not name:
            raise Untransitable(f"the character device {name} is not known")
        if kind == "qemu-vdagent":
            raise Untransitable("a clipboard has a state of its own")
        if kind == "spiceport":
            raise Untransitable("a SPICE port has a server of its own")
        arguments = []
        value = f"file,id={_escaped(name)}"
        if kind == "file" and (path := props.get("path", _NOWHERE)) != _NOWHERE:
            added, path = self._file(path)
            arguments += added
            value += f",path={path},append=on"
        else:
            value += f",path={_NOWHERE}"
        if log := props.get("logfile"):
            added, path = self._file(log)
            arguments += added
            value += f",logfile={path},logappend=on"
        return [*arguments, "-chardev", value]

    def _file(self, path: str) -> tuple[list[str], str]:
        """The options that add a file, and the path by which QEMU opens it."""
        if path.startswith("/dev/fdset/"):
            raise Untransitable(f"the file behind {path} is not known")
        number, fdset = self._descriptors.appending(path), _FIRST_FDSET + self._logs
        self._logs += 1
        return ["-add-fd", f"set={fdset},fd={number}"], f"/dev/fdset/{fdset}"

    # -- network -----------------------------------------------------------------------------------

    def _network_cards(self) -> list[str]:
        result: list[str] = []
        try:
            for option in self._cards.given(self._source, self._options):
                if option.name == "netdev":
                    result += self._backend(option)
                else:
                    _verify_device(option)
                    result += option.argv()
            for card in self._cards.plugged:
                name, backend = self._cards.backend_of(card)
                result += self._backend_of_plugged(name, backend) + as_option(card).argv()
        except UnknownBackend as err:
            raise Untransitable(err.message) from err
        return result

    def _backend(self, option: Option) -> list[str]:
        props = option.properties()
        name, kind = props.get("id", ""), props.get("", props.get("type", ""))
        if kind == "user":
            return option.argv()
        if kind != "tap":
            raise Untransitable(f"the network backend {name} ({kind}) cannot be shared")
        numbers = props.get("fds", props.get("fd", ""))
        if not re.fullmatch(r"\d+(:\d+)*", numbers):
            raise Untransitable(f"the tap of {name} was opened by QEMU itself")
        return self._tap(name, [int(number) for number in numbers.split(":")], props.get("sndbuf", ""))

    def _backend_of_plugged(self, name: str, backend: Backend) -> list[str]:
        if backend.kind == "user":
            return ["-netdev", f"user,id={name}"]
        if backend.kind != "tap" or len(backend.descriptors) != backend.queues:
            raise Untransitable(f"the network backend {name} ({backend.kind}) was plugged, and cannot be shared")
        return self._tap(name, backend.descriptors, "")

    def _tap(self, name: str, numbers: Sequence[int], send_buffer: str) -> list[str]:
        fds = ":".join(str(self._descriptors.duplicate(number)) for number in numbers)
        value = f"tap,id={_escaped(name)},{'fds' if len(numbers) > 1 else 'fd'}={fds},vhost=off"
        return ["-netdev", value + (f",sndbuf={send_buffer}" if send_buffer else "")]


def _users_of(options: Sequence[Option]) -> dict[str, dict[str, Any]]:
    """The block nodes that have another one for their file, by the name of that one."""
    nodes = [_node(option) for option in options if option.name == "blockdev"]
    return {node["file"]: node for node in nodes if isinstance(node.get("file"), str)}


def _node(option: Option) -> dict[str, Any]:
    try:
        node = json.loads(option.value or "")
    except ValueError:
        node = None
    if not isinstance(node, dict):
        raise Untransitable(f"{option} is not in the form that libvirt writes")
    return node


def _disk(option: Option, tops: Mapping[str, Mapping[str, Any]]) -> list[str]:
    node = _node(option)
    if "nbdkit" in (option.value or ""):
        raise Untransitable("the nbdkit of a disk exits with the old QEMU")
    _open_at_once(node, tops.get(str(node.get("node-name")), node))
    return ["-blockdev", json.dumps(node)]


def _open_at_once(node: dict[str, Any], top: Mapping[str, Any]) -> None:
    """:param top: the node that decides whether it is written to."""
    if node.pop("auto-read-only", False) is True:
        node["read-only"] = bool(top.get("read-only", node.get("read-only", False)))
    for below in (child for child in node.values() if isinstance(child, dict)):
        _open_at_once(below, node)


def _verify_device(option: Option) -> None:
    """:raises Untransitable: it cannot be shared."""
    props = option.properties()
    driver = props.get("", props.get("driver", ""))
    if HOST_DEVICES.match(driver):
        raise Untransitable(f"the host device behind {driver} cannot be shared")
    if _REFUSED_DEVICES.match(driver):
        raise Untransitable(f"the device {driver} cannot be shared")


def _escaped(value: str) -> str:
    return value.replace(",", ",,")
