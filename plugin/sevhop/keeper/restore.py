"""A restore of the domain in progress: who restores it, what it has started, and the query of that destination."""

from __future__ import annotations

import asyncio
from pathlib import Path

from sevhop_qmp.errors import ProcessError
from sevhop_qmp.process import QemuProcess

from . import destination
from .config import KeeperConfig, KeeperError
from .destination import ProbedDestination
from .paths import KeeperPaths
from .state import Attempt


class Restore:
    """
    One restore, from the hook's ``restore begin`` on.

    :param daemon: the process of libvirt that restores; None when that is unknown.
    """

    def __init__(self, daemon: QemuProcess | None = None) -> None:
        self._daemon = daemon
        self._starting: QemuProcess | None = None
        self._probing: asyncio.Task[ProbedDestination] | None = None

    @classmethod
    def by_parent_of(cls, hook: int) -> Restore:
        """One that a daemon begins by starting this hook."""
        try:
            stat = Path(f"/proc/{hook}/stat").read_text(errors="replace")
        except OSError:
            return cls()
        return cls(_process(int(stat.rpartition(")")[2].split()[1])))

    def started(self, pid: int) -> None:
        """This process is the destination."""
        self._starting = _process(pid)

    def attempt(self) -> Attempt:
        """What has become of it."""
        if self._starting is None or not self._starting.alive:
            return Attempt.NONE
        return Attempt.IN_PROGRESS if self._daemon is None or self._daemon.alive else Attempt.ORPHANED

    def kill(self) -> None:
        """Kill the destination, if it is known."""
        if self._starting is not None:
            self._starting.kill()

    def abandon(self) -> None:
        """Another one begins. A destination whose daemon has died can never run, and is killed."""
        if self._starting is not None and self.attempt() is Attempt.ORPHANED:
            self._starting.kill()
        if self._probing is not None:
            self._probing.cancel()

    def expect(self, config: KeeperConfig, paths: KeeperPaths) -> None:
        """Query the destination as soon as there is one."""
        self._probing = asyncio.ensure_future(destination.probe(config, paths))
        # A destination that never starts is reported by libvirt.
        self._probing.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def probed(self, timeout: float) -> ProbedDestination:
        """
        The destination, when its queries are complete.

        :raises TimeoutError: they are not within so many seconds.
        :raises SevhopError: they have failed.
        """
        if self._probing is None:
            raise KeeperError("cannot start the guest: no new QEMU is expected", "restore the domain again")
        async with asyncio.timeout(timeout):
            return await self._probing


def clear_monitor(paths: KeeperPaths) -> None:
    """
    Remove the socket of a destination that has exited. It is where QEMU's user may create anything.

    :raises KeeperError: it cannot be removed.
    """
    try:
        paths.monitor.unlink(missing_ok=True)
    except OSError as err:
        hint = f"remove it, then restore the domain again: only QEMU's monitor belongs into {paths.monitor.parent}"
        raise KeeperError(f"cannot remove {paths.monitor}: {err.strerror}", hint) from err


def _process(pid: int) -> QemuProcess | None:
    try:
        return QemuProcess.open(pid)
    except ProcessError:
        return None
