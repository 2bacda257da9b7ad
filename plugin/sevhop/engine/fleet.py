"""
Upgrades of several domains, a few at a time.

After an upgrade has failed no other begins, nor after a domain that was named is refused; those in progress are
completed. Where domains were selected by a rule instead (all, or all that are outdated), one that is refused is skipped
and reported: it was not touched, and nobody has claimed that it can hop. An interruption rolls back all that are in
progress and lets no other begin, whatever was asked for.

An upgrade has one guest, so no more guests are stopped at a time than upgrades are in progress.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

from sevhop_qmp.errors import SevhopError

from ..checks.status import survey
from ..errors import Interrupted, Refused
from ..events import DomainsSelected, Listener, ignore
from ..libvirt.connection import Connection
from ..options import UpgradeOptions
from .upgrade import Upgrade


async def all_active(uri: str) -> list[str]:
    """
    The names of all active domains.

    :raises SevhopError: libvirt does not answer.
    """
    connection = await Connection.open(uri)
    try:
        return [domain.name for domain in await connection.domains()]
    finally:
        connection.close()


async def all_outdated(uri: str, emulator: str | None) -> list[str]:
    """
    The names of those active domains that an upgrade would change, and of those for which that is unknown.

    :param emulator: the QEMU to go to; by default each domain's own, as it is on disk now.
    :raises SevhopError: libvirt does not answer.
    """
    rows = await survey(uri, (), emulator)
    return [row.name for row in rows if row.outdated or (row.blocker and not row.running_version)]


class Fleet:
    """
    Upgrades of several domains. :meth:`run` it once; :meth:`interrupt` may be called from a signal handler meanwhile.

    :ivar upgrades: those that were begun, in this order.
    """

    def __init__(
        self,
        uri: str,
        names: Sequence[str],
        options: UpgradeOptions,
        *,
        by_rule: bool = False,
        jobs: int = 1,
        keep_going: bool = False,
        listener: Listener = ignore,
    ) -> None:
        """
        :param by_rule: whether the domains were selected by a rule, not named.
        :param jobs: how many may be in progress at a time.
        :param keep_going: begin further ones after one has failed or was refused.
        """
        self.upgrades: list[Upgrade] = []
        self._uri = uri
        self._names = tuple(dict.fromkeys(names))
        self._options = options
        self._by_rule = by_rule
        self._jobs = jobs
        self._keep_going = keep_going
        self._listener = listener
        self._stopping = False
        self._interrupted = False

    async def run(self) -> None:
        """
        Upgrade. The outcome of each is in its report, and reported to the listener.

        :raises Interrupted: one was rolled back, or not begun, because of :meth:`interrupt`.
        """
        self._listener(DomainsSelected(self._names))
        waiting = iter(self._names)
        workers = [asyncio.ensure_future(self._work(waiting)) for _ in range(min(self._jobs, len(self._names)))]
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
        self._interrupted = self._interrupted or any(interrupted) or len(self.upgrades) < len(self._names)
        return any(interrupted)

    async def _work(self, waiting: Iterator[str]) -> None:
        while not self._stopping and (name := next(waiting, None)) is not None:
            upgrade = Upgrade(self._uri, name, self._options, self._listener)
            self.upgrades.append(upgrade)
            try:
                await upgrade.run()
            except SevhopError as err:
                if not self._continues_after(err):
                    self._stopping = True
            except BaseException:
                self._stopping = True
                raise

    def _continues_after(self, error: SevhopError) -> bool:
        return self._keep_going or (self._by_rule and isinstance(error, Refused))
