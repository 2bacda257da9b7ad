"""
Upgrades of several domains, a few at a time.

After an upgrade has failed no other begins, nor after a domain that was named is refused; those in progress are
completed. Whoever wants to go on all the same does so until a guest needs a person. Where domains were selected by a
rule instead (all, or all that are outdated), one that is refused is skipped and reported: it was not touched, and
nobody has claimed that it can hop. An interruption rolls back all that are in progress and lets no other begin,
whatever was asked for.

An upgrade has one guest, so no more guests are stopped at a time than upgrades are in progress. No other begins while
the host has no memory for one more, nor outside the maintenance window.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sevhop_qmp.errors import SevhopError

from ..checks.domain import or_its_hop
from ..checks.status import survey
from ..errors import GuestLost, Interrupted, RecoveryRequired, Refused
from ..events import DomainsSelected, Listener, WindowClosed, ignore
from ..libvirt.connection import Connection
from ..libvirt.daemon import NO_DOMAIN, DomainError
from ..options import UpgradeOptions, Window
from ..process import host_memory
from ..records.journal import unattended
from ..records.run_directory import hop_of
from .exclusion import is_excluded
from .upgrade import Upgrade


@dataclass(frozen=True)
class Selection:
    """
    The domains to upgrade.

    :ivar names: of them, each once.
    :ivar by_rule: they were selected by a rule, not named.
    :ivar excluded: domains that the rule would have selected.
    """

    names: tuple[str, ...]
    by_rule: bool = False
    excluded: tuple[str, ...] = ()


async def named(uri: str, given: Sequence[str]) -> Selection:
    """
    Domains that were named: all of them are looked up before anything is done with the first.

    :param given: names, UUIDs or ids.
    :raises SevhopError: there is no such domain, or libvirt does not answer.
    """
    connection = await Connection.open(uri)
    try:
        names = []
        for name in given:
            if not hop_of(name):
                with or_its_hop(name):
                    name = (await connection.look_up(name)).name
            names.append(name)
    finally:
        connection.close()
    return Selection(tuple(dict.fromkeys(names)))


async def all_active(uri: str, exclude: Sequence[str] = ()) -> Selection:
    """
    All active domains, and those whose hop nobody has completed.

    :param exclude: patterns of names (:mod:`fnmatch`); a domain may opt out as well.
    :raises SevhopError: libvirt does not answer.
    """
    connection = await Connection.open(uri)
    try:
        active = [domain.name for domain in await connection.domains()]
        # Their guests may be elsewhere; their upgrade is refused, and says what to do.
        names = sorted({*active, *unattended()})
        return await _without_excluded(connection, names, exclude)
    finally:
        connection.close()


async def all_outdated(uri: str, emulator: str | None, exclude: Sequence[str] = ()) -> Selection:
    """
    Those active domains that an upgrade would change, and those for which that is unknown; also domains whose hop
    nobody has completed.

    :param emulator: the QEMU to go to; by default each domain's own, as it is on disk now.
    :param exclude: patterns of names (:mod:`fnmatch`); a domain may opt out as well.
    :raises SevhopError: libvirt does not answer.
    """
    rows = await survey(uri, (), emulator)
    names = [row.name for row in rows if row.outdated or (row.blocker and not row.running_version)]
    names = sorted({*names, *unattended()})  # see all_active
    connection = await Connection.open(uri)
    try:
        return await _without_excluded(connection, names, exclude)
    finally:
        connection.close()


async def _without_excluded(connection: Connection, names: Sequence[str], exclude: Sequence[str]) -> Selection:
    chosen, excluded = list[str](), list[str]()
    for name in names:
        (excluded if await _is_excluded(connection, name, exclude) else chosen).append(name)
    return Selection(tuple(chosen), True, tuple(sorted(excluded)))


async def _is_excluded(connection: Connection, name: str, exclude: Sequence[str]) -> bool:
    try:
        return await is_excluded(name, await connection.domain(name), exclude)
    except DomainError as err:
        if err.code != NO_DOMAIN:  # one in a hop may be unknown; then its upgrade is refused
            raise
        return await is_excluded(name, None, exclude)


class Fleet:
    """
    Upgrades of several domains. :meth:`run` it once; :meth:`interrupt` may be called from a signal handler meanwhile.

    :ivar upgrades: those that were begun, in this order.
    """

    def __init__(
        self,
        uri: str,
        selection: Selection,
        options: UpgradeOptions,
        *,
        jobs: int = 1,
        keep_going: bool = False,
        max_failures: int = 1,
        window: Window | None = None,
        listener: Listener = ignore,
    ) -> None:
        """
        :param jobs: how many may be in progress at a time, as far as there is memory.
        :param keep_going: begin further ones after one has failed or was refused.
        :param max_failures: how many guests may need a person until no further one begins all the same.
        :param window: when an upgrade may begin; always by default.
        """
        self.upgrades: list[Upgrade] = []
        self._uri = uri
        self._selection = selection
        self._options = options
        self._jobs = jobs
        self._keep_going = keep_going
        self._failures_left = max_failures
        self._window = window
        self._listener = listener
        self._in_progress = 0
        self._one_has_ended = asyncio.Condition()
        self._stopping = False
        self._interrupted = False

    async def run(self) -> None:
        """
        Upgrade. The outcome of each is in its report, and reported to the listener.

        :raises Interrupted: one was rolled back, or not begun, because of :meth:`interrupt`.
        """
        names = self._selection.names
        self._listener(DomainsSelected(names, self._selection.excluded))
        waiting = iter(names)
        workers = [asyncio.ensure_future(self._work(waiting)) for _ in range(min(self._jobs, len(names)))]
        if workers:
            await asyncio.wait(workers)
        for worker in workers:
            worker.result()
        if self._interrupted:
            raise Interrupted("interrupted")

    def interrupt(self) -> bool:
        """Roll back those in progress that are not committed, and begin no other. :return: whether there was one."""
        self._stopping = True
        interrupted = [upgrade.interrupt() for upgrade in self.upgrades if not upgrade.report.outcome]
        self._interrupted = self._interrupted or any(interrupted) or len(self.upgrades) < len(self._selection.names)
        return any(interrupted)

    async def _work(self, waiting: Iterator[str]) -> None:
        while (name := await self._next(waiting)) is not None:
            upgrade = Upgrade(self._uri, name, self._options, self._listener)
            self.upgrades.append(upgrade)
            self._in_progress += 1
            try:
                await upgrade.run()
            except SevhopError as err:
                if not self._continues_after(err):
                    self._stopping = True
            except BaseException:
                self._stopping = True
                raise
            finally:
                self._in_progress -= 1
                async with self._one_has_ended:
                    self._one_has_ended.notify_all()

    async def _next(self, waiting: Iterator[str]) -> str | None:
        """The next domain, when it may begin; None if none may."""
        async with self._one_has_ended:
            await self._one_has_ended.wait_for(self._may_begin)
        if self._window is not None and not self._stopping and not self._window.is_open():
            self._stopping = True
            if left := tuple(waiting):
                self._listener(WindowClosed(str(self._window), left))
        return None if self._stopping else next(waiting, None)

    def _may_begin(self) -> bool:
        """The first one always may: whether it can is its own check's business."""
        return self._stopping or not self._in_progress or host_memory.has_room(self._in_progress + 1)

    def _continues_after(self, error: SevhopError) -> bool:
        if isinstance(error, RecoveryRequired | GuestLost):
            self._failures_left -= 1
            return self._keep_going and self._failures_left > 0
        return self._keep_going or (self._selection.by_rule and isinstance(error, Refused))
