"""The stream sockets of a process, and their addresses in a form that compares."""

from __future__ import annotations

import os
import socket

from .process import QemuProcess

#: A stream socket's address: (family, path) or (family, host, port).
Address = tuple[int, str] | tuple[int, str, int]


def listeners(process: QemuProcess) -> dict[Address, int]:
    """Duplicates of a process's listening stream sockets, by address. The caller closes them."""
    found: dict[Address, int] = {}
    for descriptor in process.descriptors():
        if not descriptor.target.startswith("socket:"):
            continue
        sock = socket.socket(fileno=process.duplicate(descriptor.number))
        if (address := listening_address(sock)) is None or address in found:
            sock.close()
        else:
            found[address] = sock.detach()
    return found


def connections(process: QemuProcess, name: str) -> list[int]:
    """
    Duplicates of a process's connected UNIX sockets whose own path ends in a file name. The caller closes them.

    Their peers do not notice the exit of the process for as long as the duplicates are open.
    """
    found = []
    for descriptor in process.descriptors():
        if not descriptor.target.startswith("socket:"):
            continue
        sock = socket.socket(fileno=process.duplicate(descriptor.number))
        own = sock.getsockname() if sock.family == socket.AF_UNIX else ""
        if isinstance(own, str) and own.endswith(f"/{name}") and listening_address(sock) is None:
            found.append(sock.detach())
        else:
            sock.close()
    return found


def listening_address(sock: socket.socket) -> Address | None:
    """The address of a listening stream socket; None for every other socket."""
    try:
        if sock.type != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return None
        name = sock.getsockname()
    except OSError:
        return None
    if sock.family == socket.AF_UNIX:
        # Abstract names come as bytes; with surrogates they compare like paths do.
        return (int(sock.family), os.fsdecode(name))
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        return (int(sock.family), name[0], name[1])
    return None


def address_from_sockaddr(raw: bytes) -> Address | None:
    """
    The same form from a raw ``struct sockaddr`` (unix(7), ip(7), ipv6(7)).

    :return: None for a family that is not supported, or for bytes that are no such address.
    """
    if len(raw) < 2:
        return None
    family = int.from_bytes(raw[:2], "little")
    if family == socket.AF_UNIX:
        path = raw[2:]
        if not path:
            return None
        return (family, os.fsdecode(path if path[:1] == b"\0" else path.split(b"\0", 1)[0]))
    if family == socket.AF_INET and len(raw) >= 8:
        return (family, socket.inet_ntop(socket.AF_INET, raw[4:8]), int.from_bytes(raw[2:4], "big"))
    if family == socket.AF_INET6 and len(raw) >= 24:
        return (family, socket.inet_ntop(socket.AF_INET6, raw[8:24]), int.from_bytes(raw[2:4], "big"))
    return None
