"""One restore of a domain whose guest runs in the transit: what outlives a keeper of it, and who takes part in it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

from sevhop_qmp import selinux
from sevhop_qmp.errors import ProcessError
from sevhop_qmp.process import QemuProcess
from sevhop_qmp.run_mark import RunMark, RunState

from ..keeper.config import KeeperConfig, KeeperError
from ..keeper.handover import HandoverProtocol, SourceHandles
from ..keeper.paths import KeeperPaths
from .port import DestinationPort

Result = TypeVar("Result")

#: Names in a checkpoint.
_READER, _WRITER, _MARK, _DESTINATION, _DAEMON, _SOCKET = (
    "stream reader",
    "stream writer",
    "run mark",
    "destination",
    "daemon",
    "destination's socket",
)
_PIPE_SIZE = 1 << 20


class TransitAttempt:
    """
    From libvirt's ``restore begin`` until the guest is in the destination, or it is certain that it will not be.

    :param transit: the QEMU that the guest runs in.
    :param connected: called with the pid of the destination, when that is known.
    :param stored: descriptors of a checkpoint, by name; those that belong here are taken out. None for a new one.
    :ivar daemon: the process of libvirt that restores; None when that is unknown.
    :ivar destination: the QEMU that it has started; None before.
    :ivar header_given: the destination has the beginning of the stream.
    :ivar announced: libvirt was asked to finish its work.
    :ivar accepted: libvirt has.
    :ivar ended_by_us: another restore has begun, or the command has ended this one.
    """

    def __init__(
        self,
        config: KeeperConfig,
        paths: KeeperPaths,
        handles: SourceHandles,
        transit: QemuProcess,
        connected: Callable[[int], None],
        stored: dict[str, int] | None = None,
    ) -> None:
        self._destination_known = connected
        self._uid = config.uid
        self.header_given = self.announced = self.accepted = self.ended_by_us = False
        self.daemon: QemuProcess | None = None
        self.destination: QemuProcess | None = None
        if stored is None:
            self.reader, self.writer = os.pipe2(os.O_CLOEXEC)
            selinux.share(self.reader)
            os.set_blocking(self.writer, False)
            with contextlib.suppress(OSError):
                fcntl.fcntl(self.reader, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
            self.run_mark = RunMark.create()
        else:
            self.reader, self.writer = stored.pop(_READER), stored.pop(_WRITER, -1)
            self.run_mark = RunMark(stored.pop(_MARK))
        protocol = HandoverProtocol(
            handles, config.context, self.run_mark, source=transit, stops_at_reboot=config.stops_at_reboot
        )
        self.port = DestinationPort(protocol, self.reader, paths.image, self._connected)
        if stored is not None and (sock := stored.pop(_SOCKET, None)) is not None:
            self.port.restore(sock)

    # -- checkpoints -------------------------------------------------------------------------------

    def as_fields(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "header_given": self.header_given,
            "announced": self.announced,
            "accepted": self.accepted,
            "daemon": self.daemon.pid if self.daemon else 0,
            "destination": self.destination.pid if self.destination else 0,
        }

    def descriptors(self, *, hopping: bool) -> dict[str, int]:
        """
        For a checkpoint.

        :param hopping: the stream is being given, and is complete when its last writer has closed it.
        """
        found = {_READER: self.reader, _MARK: self.run_mark.fileno()}
        if not hopping and self.writer >= 0:
            found[_WRITER] = self.writer
        if self.port.descriptor is not None:
            found[_SOCKET] = self.port.descriptor
        for name, process in ((_DESTINATION, self.destination), (_DAEMON, self.daemon)):
            if process is not None:
                found[name] = process.fileno()
        return found

    def restore(self, fields: Mapping[str, Any], stored: dict[str, int]) -> None:
        """Have what :meth:`as_fields` has stored."""
        self.header_given, self.announced = bool(fields["header_given"]), bool(fields["announced"])
        self.accepted = bool(fields["accepted"])
        if _DESTINATION in stored:
            self.destination = QemuProcess(fields["destination"], stored.pop(_DESTINATION))
        if _DAEMON in stored:
            self.daemon = QemuProcess(fields["daemon"], stored.pop(_DAEMON))

    # -- who takes part ----------------------------------------------------------------------------

    def begun_by(self, hook: int) -> None:
        """The daemon that restores is the parent of this hook."""
        with contextlib.suppress(OSError, ValueError):
            stat = Path(f"/proc/{hook}/stat").read_text(errors="replace")
            self.daemon = _process(int(stat.rpartition(")")[2].split()[1]))

    def _connected(self) -> None:
        process = _process(self.port.peer)
        # Its pid may be another process's by now.
        with contextlib.suppress(ProcessError):
            if process is not None and process.credentials.uid == self._uid:
                self.destination = process
        self._destination_known(self.port.peer)

    def duplicate_of_writer(self) -> int:
        """The end of the pipe to which the hop writes, for itself."""
        return os.dup(self.writer)

    def give_stream(self) -> None:
        """The hop alone writes to the stream from here on, and ends it."""
        os.close(self.writer)
        self.writer = -1

    @property
    def has_run(self) -> bool:
        """Whether the guest has run in the destination."""
        return self.port.runs.is_set() or self.run_mark.read() is RunState.RAN

    @property
    def in_progress(self) -> bool:
        """Whether its destination lives, and somebody may let the guest run there."""
        if self.destination is None or not self.destination.alive:
            return False
        return self.accepted or self.daemon is None or self.daemon.alive

    async def unless_ended(self, work: Coroutine[Any, Any, Result]) -> Result:
        """
        Wait for something that the destination, or libvirt, does.

        :raises KeeperError: the destination has exited, or the daemon has before it has accepted it.
        """
        doing = asyncio.ensure_future(work)
        ends = asyncio.ensure_future(self._ends())
        try:
            await asyncio.wait({doing, ends}, return_when=asyncio.FIRST_COMPLETED)
            if not doing.done():
                raise KeeperError(ends.result(), "restore the domain again")
            return doing.result()
        finally:
            for task in (doing, ends):
                task.cancel()
            await asyncio.gather(doing, ends, return_exceptions=True)

    async def _ends(self) -> str:
        """Wait until the hop is not possible any more. :return: why."""
        while True:
            watched = {"the new QEMU exited": self.destination, "the libvirt daemon exited": self.daemon}
            for reason, process in watched.items():
                if process is not None and await process.wait(_POLL):
                    return reason
            if self.destination is None and self.daemon is None:
                await asyncio.sleep(_POLL)

    def close(self) -> None:
        """It is over: the destination cannot begin to run the guest any more, unless it has."""
        self.port.close()
        for fd in (self.reader, self.writer):
            if fd >= 0:
                os.close(fd)
        self.run_mark.close()
        for process in (self.destination, self.daemon):
            if process is not None:
                process.close()


#: Seconds between two looks at who takes part.
_POLL = 0.05


def _process(pid: int) -> QemuProcess | None:
    try:
        return QemuProcess.open(pid)
    except ProcessError:
        return None
