"""
The process at the other end of a UNIX socket.

Without asyncio and qemu.qmp, which take 50 ms to import: the process is known while they are.
"""

from __future__ import annotations

import os
import socket
import struct

from . import selinux
from .errors import MonitorError


def open_socket() -> socket.socket:
    """A socket that does not block, for a connection to a QEMU; see :func:`sevhop_qmp.selinux.sharing_sockets`."""
    # QEMU's end of it gets the level of this one.
    with selinux.sharing_sockets():
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    sock.setblocking(False)
    return sock


def absolute(path: str | os.PathLike[str]) -> str:
    """
    The absolute path of a socket.

    :raises MonitorError: it is relative to a directory that is gone.
    """
    try:
        return os.path.abspath(path)
    except OSError as err:
        what = f"cannot find the socket {os.fspath(path)}: the working directory is gone"
        raise MonitorError(what, "name it by its absolute path") from err


def is_served(path: str) -> bool:
    """Whether a process accepts connections at a UNIX socket."""
    with open_socket() as sock:
        try:
            sock.connect(path)
        except BlockingIOError:  # too many clients wait already
            return True
        except OSError:
            return False
        return True


def peer_credentials(sock: socket.socket) -> tuple[int, int, int]:
    """The (pid, uid, gid) of the process at the other end of a UNIX socket (SO_PEERCRED, unix(7))."""
    pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid, gid
