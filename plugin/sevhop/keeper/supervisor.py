"""
The guardian: what a keeper holds is held twice, so that the death of one process loses nothing.

Between two QEMUs a guest is a few descriptors and a few words about them. If a single process had them, whatever ends
that process (the OOM killer, a bug) would end the guest. So there are two. The guardian has everything and does
nothing; the keeper is forked from it and does everything. ::

    guardian ──fork──> keeper      with every descriptor that the guardian has, and the last deposit
             <─deposit──           the keeper's record and its new descriptors, before it acts on them

A deposit is in the guardian's socket when it has been sent, and the kernel keeps it there should the keeper die with
its next instruction: nobody waits for an answer. When the keeper dies, the guardian forks another, which goes on from
the last deposit. When the guardian dies, the keeper goes on alone. Sockets that listened before the fork belong to both
and take connections at any time.

This is what the descriptor store of systemd does for its services (sd_pid_notify_with_fds(3)); with a guardian it is
not needed, and the same holds without systemd. What remains is that both are killed at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import syslog
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

#: Keepers that are forked at once after their predecessor; then only if the guest is nowhere else, and slowly.
RESPAWNS = 5
#: Seconds between two keepers then. One that has lived for so long has not died of a fault that repeats itself.
PAUSE = 60.0
#: Bytes that no deposit can have: more than a socket takes.
_LONGEST = 1 << 18
_MOST_DESCRIPTORS = 64


class Deposit:
    """
    The keeper's side: what it finds there when it begins, and where it puts what the next one is to find.

    :ivar record: what was put last; empty for the first keeper.
    :ivar descriptors: by name, those that were put with it.
    """

    def __init__(
        self, record: dict[str, Any], descriptors: dict[str, int], guardian: socket.socket | None = None
    ) -> None:
        self.record = record
        self.descriptors = descriptors
        self._guardian = guardian

    def put(self, record: Mapping[str, Any], descriptors: Mapping[str, int], *, needed: bool) -> None:
        """
        Replace what is there. Without a guardian nothing happens.

        :param needed: whether the guest exists nowhere else.
        """
        if self._guardian is None:
            return
        text = json.dumps({"record": record, "names": list(descriptors), "needed": needed})
        try:
            socket.send_fds(self._guardian, [text.encode()], list(descriptors.values()))
        except OSError:
            # It has died. Everything is here as well.
            self._guardian.close()
            self._guardian = None


class Guardian:
    """
    Forks keepers until one has done its work.

    :param work: what a keeper does; 0 when the guest does not need a keeper any more. It runs with SIGTERM blocked.
    """

    def __init__(self, work: Callable[[Deposit], int], *, respawns: int = RESPAWNS, pause: float = PAUSE) -> None:
        self._work = work
        self._respawns = respawns
        self._pause = pause
        self._record: dict[str, Any] = {}
        self._descriptors: dict[str, int] = {}
        self._needed = False
        self._keeper = 0

    def run(self) -> int:
        """:return: 0 when a keeper has done its work; 1 when they keep dying, and the guest does not need one."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        signal.signal(signal.SIGTERM, lambda *_: os.kill(self._keeper, signal.SIGTERM))
        deaths = 0
        while True:
            began = time.monotonic()
            try:
                status = self._one_keeper()
            except OSError as err:  # no process to be had
                status = err.errno or os.EX_OSERR
            if status == 0:
                return 0
            deaths = deaths + 1 if time.monotonic() - began < self._pause else 1
            again = deaths <= self._respawns
            after = "" if again else f" in {self._pause:g} s" if self._needed else ", and is not needed: giving up"
            syslog.syslog(syslog.LOG_CRIT, f"sevhop: a keeper has died ({status}); the next one follows{after}")
            if not again:
                if not self._needed:
                    return 1
                time.sleep(self._pause)

    def _one_keeper(self) -> int:
        """Fork one and take its deposits until it has ended. :return: its exit code, or its signal, negative."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            pid = os.fork()
            if pid == 0:
                ours.close()
                self._be_keeper(theirs)
            theirs.close()
            self._keeper = pid
            # Only while there is somebody to pass it on to.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            while self._receive(ours):
                pass
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def _be_keeper(self, guardian: socket.socket) -> None:
        """Never returns: what is above us on the stack is the guardian's."""
        status = os.EX_SOFTWARE
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            status = self._work(Deposit(self._record, self._descriptors, guardian))
        except BaseException as err:
            syslog.syslog(syslog.LOG_CRIT, f"sevhop: in a keeper: {type(err).__name__}: {err}")
        finally:
            os._exit(status)

    def _receive(self, keeper: socket.socket) -> bool:
        """Take one deposit. :return: False when there will be none any more."""
        try:
            text, fds, flags, _ = socket.recv_fds(keeper, _LONGEST, _MOST_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            return False
        if not text:
            return False
        replaced = list(fds)
        # One that did not arrive as a whole is none: the last one stays.
        if not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            message = json.loads(text)
            replaced = list(self._descriptors.values())
            self._descriptors = dict(zip(message["names"], fds, strict=True))
            self._record, self._needed = message["record"], message["needed"]
        for fd in replaced:
            os.close(fd)
        return True


def protect() -> None:
    """Make this process, and those that it forks, hard to end by accident. What needs rights that we lack is left."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    os.chdir("/")
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("-1000")


def rename(name: str) -> None:
    """What ps(1) calls this process: at most 15 characters."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(name)
