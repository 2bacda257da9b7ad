"""
The supervisor: it has a duplicate of every descriptor and restarts the keeper from its last checkpoint.

Between two QEMUs a guest consists of a few descriptors and a record about them. If a single process had them, whatever
kills that process (the OOM killer, a bug) would destroy the guest. So there are two: the supervisor, which does nothing
but wait, and the keeper, which is forked from it and does everything. ::

    supervisor ──fork──> keeper    with every descriptor that the supervisor has, and the last checkpoint
               <──store──          the keeper's record and its new descriptors, before it acts on them

A checkpoint is in the supervisor's socket when it has been sent, and the kernel keeps it there even if the keeper dies
with its next instruction: no reply is awaited. When the keeper dies, the supervisor forks another, which continues from
the last checkpoint. When the supervisor dies, the keeper continues alone. Sockets that listened before the fork belong
to both and accept connections at any time.

The keeper's end of this is in :mod:`sevhop.keeper.fdstore`. A guest is lost only if both are killed at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import syslog
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .fdstore import FdStore

#: Keepers that are restarted immediately; after that only if the guest is nowhere else, and slowly.
RESPAWNS = 5
#: Seconds between two keepers then. One that has lived for so long has not died of a fault that repeats itself.
PAUSE = 60.0
#: Bytes that no checkpoint can have: more than a socket takes.
_LONGEST = 1 << 18
_MOST_DESCRIPTORS = 64


class Supervisor:
    """
    Forks keepers until one is done.

    :param work: what a keeper does; 0 when the guest does not need a keeper any more. It runs with SIGTERM blocked.
    """

    def __init__(self, work: Callable[[FdStore], int], *, respawns: int = RESPAWNS, pause: float = PAUSE) -> None:
        self._work = work
        self._respawns = respawns
        self._pause = pause
        self._record: dict[str, Any] = {}
        self._descriptors: dict[str, int] = {}
        self._needed = False
        self._keeper = 0

    def run(self) -> int:
        """:return: 0 when a keeper is done; 1 when they keep dying, and the guest does not need one."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        signal.signal(signal.SIGTERM, lambda *_: os.kill(self._keeper, signal.SIGTERM))
        deaths = 0
        while True:
            began = time.monotonic()
            try:
                status = self._one_keeper()
            except OSError as err:  # cannot fork
                status = err.errno or os.EX_OSERR
            if status == 0:
                return 0
            deaths = deaths + 1 if time.monotonic() - began < self._pause else 1
            again = deaths <= self._respawns
            delayed = f"restarting it in {self._pause:g} s" if self._needed else "it is not needed, giving up"
            action = "restarting it" if again else delayed
            syslog.syslog(syslog.LOG_CRIT, f"sevhop: the keeper has exited unexpectedly (status {status}): {action}")
            if not again:
                if not self._needed:
                    return 1
                time.sleep(self._pause)

    def _one_keeper(self) -> int:
        """Fork one and receive its checkpoints until it exits. :return: its exit code, or its signal, negative."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            pid = os.fork()
            if pid == 0:
                ours.close()
                self._be_keeper(theirs)
            theirs.close()
            self._keeper = pid
            # SIGTERM is forwarded only while there is a keeper.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            while self._receive(ours):
                pass
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def _be_keeper(self, supervisor: socket.socket) -> None:
        """Never returns: the callers on the stack are the supervisor's."""
        status = os.EX_SOFTWARE
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            status = self._work(FdStore(self._record, self._descriptors, supervisor))
        except BaseException as err:
            syslog.syslog(syslog.LOG_CRIT, f"sevhop: unexpected error in the keeper: {type(err).__name__}: {err}")
        finally:
            os._exit(status)

    def _receive(self, keeper: socket.socket) -> bool:
        """Receive one checkpoint. :return: False when there will be no more."""
        try:
            text, fds, flags, _ = socket.recv_fds(keeper, _LONGEST, _MOST_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            return False
        if not text:
            return False
        replaced = list(fds)
        # A truncated one is discarded: the last one stays.
        if not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            message = json.loads(text)
            replaced = list(self._descriptors.values())
            self._descriptors = dict(zip(message["names"], fds, strict=True))
            self._record, self._needed = message["record"], message["needed"]
        for fd in replaced:
            os.close(fd)
        return True


def protect() -> None:
    """Protect this process, and those that it forks, from signals and, if we may, from the OOM killer."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    os.chdir("/")
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("-1000")


def rename(name: str) -> None:
    """Set what ps(1) calls this process; the kernel truncates it to 15 characters."""

    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(name)
