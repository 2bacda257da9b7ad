"""
The files that QEMU opens when libvirt starts a domain again, and whether its user can.

libvirt gives most files to QEMU's user before it starts it, and takes them back when it has exited
(``dynamic_ownership``). Of these only the way there matters; of the others also their mode.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element

from sevhop_qmp.credentials import Credentials

from ..disks.block_graph import FILE_DRIVERS, BlockGraph, Node

_CONFIGURATION = Path("/etc/libvirt/qemu.conf")
_OWNERSHIP = re.compile(r"^\s*dynamic_ownership\s*=\s*(?P<value>\d+)", re.MULTILINE)
#: QOM path of the flash that firmware and its variables are in.
FLASH = "/machine/system.flash"
#: Descriptors that libvirt passes to QEMU.
_PASSED = "/dev/fdset/"
#: What a domain is booted with, and whether libvirt gives it to QEMU's user.
_BOOT = (
    ("os/loader", "firmware", False),
    ("os/kernel", "kernel", True),
    ("os/initrd", "initial RAM disk", True),
    ("os/dtb", "device tree", True),
    ("os/acpi/table", "ACPI table", True),
)
#: Devices that write a file, or listen on a socket, which must have a directory.
_CHARACTER = ("serial", "parallel", "console", "channel", "redirdev", "smartcard")
#: The sockets of this network namespace, and the kernel's mark of one that listens (__SO_ACCEPTCON).
_SOCKETS = Path("/proc/net/unix")
_LISTENS = 0x10000
#: The same of TCP.
_PORTS = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_TCP_LISTEN = "0A"


@dataclass(frozen=True)
class File:
    """
    A file that QEMU opens.

    :ivar what: what it is for, in a message.
    :ivar access: letters of ``rw``.
    :ivar given: whether libvirt gives it to QEMU's user.
    """

    what: str
    path: str
    access: str
    given: bool


def ownership_is_dynamic(configuration: Path = _CONFIGURATION) -> bool:
    """Whether libvirt gives files to QEMU's user at all."""
    try:
        found = _OWNERSHIP.findall(configuration.read_text(errors="replace"))
    except OSError:
        found = []
    return not found or found[-1] != "0"


def of(domain: Element, graph: BlockGraph, *, dynamic: bool) -> list[File]:
    """
    The files of a domain.

    :param domain: its XML.
    :param graph: its disks.
    :param dynamic: see :func:`ownership_is_dynamic`.
    """
    dynamic = dynamic and not any(_keeps_owner(label) for label in domain.iterfind("seclabel"))
    kept = {
        source.get(attribute)
        for source in domain.iterfind("devices/disk//source")
        for attribute in ("file", "dev")
        if any(_keeps_owner(label) for label in source.iterfind("seclabel"))
    }
    kept |= {(domain.findtext("os/loader") or "").strip()}
    found = []
    for disk in graph.disks.values():
        what = "firmware" if disk.qdev.startswith(FLASH) else f"disk {disk.name}"
        for node, access in _nodes(graph, disk.root, "rw") if disk.root else ():
            if node.driver in FILE_DRIVERS and not node.filename.startswith(_PASSED):
                found.append(File(what, node.filename, access, dynamic and node.filename not in kept))
    disks = {file.path for file in found}
    for path, what, given in _BOOT:
        found += [
            File(what, element.text.strip(), "r", dynamic and given)
            for element in domain.iterfind(path)
            if element.text and element.text.strip() not in disks
        ]
    return found


def _nodes(graph: BlockGraph, name: str, access: str) -> Iterator[tuple[Node, str]]:
    """A node and all below it, with the access that QEMU needs; below one that it only reads it only reads."""
    node = graph.nodes[name]
    access = "r" if node.read_only else access
    yield node, access
    for role, child in node.children.items():
        yield from _nodes(graph, child, "r" if role == "backing" else access)


def _keeps_owner(label: Element) -> bool:
    """Whether this ``<seclabel>`` keeps libvirt from giving files to QEMU's user."""
    for_owner = label.get("model", "dac") == "dac"
    return for_owner and (label.get("relabel") == "no" or label.get("type") == "none")


def obstacle(file: File, user: Credentials) -> str:
    """Why QEMU could not open a file; empty if it could."""
    try:
        os.stat(file.path)
    except PermissionError:
        pass  # root is not everywhere the one that may do most (NFS, FUSE)
    except OSError as err:
        return f"{file.what}: {file.path}: {err.strerror}"
    access = "e" if file.given else file.access
    if user.may(access, Path(file.path)):
        return ""
    verb = {"e": "reach", "r": "read", "rw": "write"}[access]
    return f"{file.what}: the user of QEMU ({user.uid}) cannot {verb} {file.path}"


def without_directory(domain: Element) -> list[str]:
    """Logs and sockets that QEMU or libvirt creates, whose directory does not exist."""
    found = []
    for device in _character_devices(domain):
        paths = [log.get("file", "") for log in device.iterfind("log")]
        for source in device.iterfind("source"):
            if device.get("type") == "file" or (device.get("type") == "unix" and source.get("mode") != "connect"):
                paths.append(source.get("path", ""))
        found += [f"{device.tag}: the directory of {path} does not exist" for path in paths if _has_no_directory(path)]
    for listen in domain.iterfind("devices/graphics/listen[@type='socket']"):
        if _has_no_directory(path := listen.get("socket", "")):
            found.append(f"graphics: the directory of {path} does not exist")
    return found


def without_server(domain: Element) -> list[str]:
    """Sockets to which QEMU connects when it starts, on which nobody listens."""
    found = []
    for device in _character_devices(domain):
        for source in device.iterfind("source[@mode='connect']"):
            again = source.find("reconnect")
            waits = again is not None and again.get("enabled") == "yes"
            path, host, port = (source.get(key, "") for key in ("path", "host", "service"))
            if device.get("type") == "unix" and not waits and not listens(path):
                found.append(f"{device.tag}: no process listens on {path}")
            if device.get("type") == "tcp" and not waits and not _port_is_served(host, port):
                found.append(f"{device.tag}: no process listens on {host} port {port}")
    for server in domain.iterfind("devices/disk/source/host"):
        path, host, port = (server.get(key, "") for key in ("socket", "name", "port"))
        if server.get("transport") == "unix" and not listens(path):
            found.append(f"disk: no process listens on {path}")
        if server.get("transport", "tcp") == "tcp" and not _port_is_served(host, port):
            found.append(f"disk: no process listens on {host} port {port}")
    return found


def listens(path: str, listed: Path = _SOCKETS) -> bool:
    """Whether a process listens on a socket. If it is listed nobody connects: its server may serve one client only."""
    try:
        status = os.stat(path)
        rows = [line.split(maxsplit=7) for line in listed.read_text(errors="surrogateescape").splitlines()[1:]]
    except OSError:
        return False
    for _, _, _, flags, *_, name in (row for row in rows if len(row) == 8):
        with contextlib.suppress(OSError, ValueError):
            if int(flags, 16) & _LISTENS and os.path.samestat(os.stat(name), status):
                return True
    # It is not listed: nobody listens, or somebody in another network namespace.
    with socket.socket(socket.AF_UNIX) as client:
        client.setblocking(False)
        try:
            client.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True
    return True


def _port_is_served(host: str, port: str) -> bool:
    """Whether a process of this host listens on a port. Of other hosts nothing is known, and of ports with a name."""
    if not port.isdigit() or not (host in ("localhost", "::1") or host.startswith("127.")):
        return True
    listed = []
    for path in _PORTS:
        with contextlib.suppress(OSError):
            listed += [line.split() for line in path.read_text().splitlines()[1:]]
    return any(int(row[1].rpartition(":")[2], 16) == int(port) and row[3] == _TCP_LISTEN for row in listed)


def _has_no_directory(path: str) -> bool:
    return path.startswith("/") and not os.path.isdir(os.path.dirname(path))


def _character_devices(domain: Element) -> Iterator[Element]:
    devices = domain.find("devices")
    for device in devices if devices is not None else ():
        if device.tag in _CHARACTER:
            yield device
