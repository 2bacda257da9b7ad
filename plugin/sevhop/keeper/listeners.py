"""Finds the processes of a keeper that does not reply: they have the sockets that it listens on."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from sevhop_qmp.errors import SevhopError
from sevhop_qmp.pidfd_process import PidfdProcess

#: Of a listening socket in ``/proc/net/unix`` (__SO_ACCEPTCON).
_ACCEPTS = 0x10000
_SUPERVISOR = "sevhop-supervisor"[:15]


def listening_at(path: Path) -> list[PidfdProcess]:
    """
    The processes that listen on a UNIX socket, the supervisor first: it would start another keeper.

    :param path: of the socket; it is in our network namespace.
    """
    sockets = {f"socket:[{inode}]" for inode in _inodes(str(path))}
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()] if sockets else []
    found = []
    for pid in sorted(pids, key=_is_supervisor, reverse=True):
        if pid == os.getpid():
            continue
        with contextlib.suppress(SevhopError):
            process = PidfdProcess.open(pid)
            if _has_one_of(sockets, pid):
                found.append(process)
            else:
                process.close()
    return found


def _inodes(path: str) -> set[str]:
    """Of the listening sockets bound to a path (proc_net(5))."""
    found = set()
    for line in Path("/proc/net/unix").read_text(errors="surrogateescape").splitlines()[1:]:
        _, _, _, flags, _, _, inode, *bound = line.split(maxsplit=7)
        if bound == [path] and int(flags, 16) & _ACCEPTS:
            found.add(inode)
    return found


def _is_supervisor(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip() == _SUPERVISOR
    return False


def _has_one_of(sockets: set[str], pid: int) -> bool:
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{name}") in sockets:
                    return True
    return False
