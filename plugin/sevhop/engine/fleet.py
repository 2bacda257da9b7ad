"""
Upgrades of several domains, a few at a time.

An upgrade that fails lets no other begin, and so does a domain that was named and is refused; those that are under way
go on to their ends. Where domains were chosen by a rule instead (all, or all that are outdated), one that is refused
stops nothing: it was not touched, and nobody has said that it can hop. An interruption undoes all that are under way
and lets no other begin, whatever was asked for.

An upgrade has one guest, so no more guests are stopped at a time than upgrades are under way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

from sevhop_qmp.errors import SevhopError

from ..checks.status import survey
from ..errors import Interrupted, Refused
from ..events import Chosen, Listener, ignore
from ..libvirt.connection import Connection
from .upgrade import Options, Upgrade


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
    The names of those active domains that an upgrade would change, and of those for which that cannot be told.

    :param emulator: the QEMU to go to; by default each domain's own, as it is on disk now.
    :raises SevhopError: libvirt does not answer.
    """
    rows = await survey(uri, (), emulator)
    return [row.name for row in rows if row.outdated or (row.obstacle and not row.running)]


class Fleet:
    """
    Upgrades of several domains. :meth:`run` it once; :meth:`interrupt` may be called from a signal handler meanwhile.

    :ivar upgrades: those that were begun, in this order.
    """

    def __init__(
        self,
        uri: str,
        names: Sequence[str],
        options: Options,
        *,
        chosen: bool = False,
        jobs: int = 1,
        keep_going: bool = False,
        listener: Listener = ignore,
    ) -> None:
        """
        :param chosen: whether the domains were chosen by a rule, not named.
        :param jobs: how many may be under way at a time.
        :param keep_going: begin further ones when one fails or is refused.
        """
        self.upgrades: list[Upgrade] = []
        self._uri = uri
        self._names = tuple(dict.fromkeys(names))
        self._options = options
        self._chosen = chosen
        self._jobs = jobs
        self._keep_going = keep_going
        self._listener = listener
        self._over = False
        self._interrupted = False

    async def run(self) -> None:
        """
        Upgrade. What becomes of each is in its report, and the listener is told.

        :raises Interrupted: one was undone, or not begun, since somebody has asked for that.
        """
        self._listener(Chosen(self._names))
        waiting = iter(self._names)
        workers = [asyncio.ensure_future(self._work_off(waiting)) for _ in range(min(self._jobs, len(self._names)))]
        if workers:
            await asyncio.wait(workers)
        for worker in workers:
            worker.result()
        if self._interrupted:
            raise Interrupted("interrupted")

    def interrupt(self) -> bool:
        """Undo those under way that still can be undone, and begin no other. :return: whether there was one of them."""
        self._over = True
        undone = [upgrade.interrupt() for upgrade in self.upgrades if not upgrade.report.outcome]
        self._interrupted = self._interrupted or any(undone) or len(self.upgrades) < len(self._names)
        return any(undone)

    async def _work_off(self, waiting: Iterator[str]) -> None:
        while not self._over and (name := next(waiting, None)) is not None:
            upgrade = Upgrade(self._uri, name, self._options, self._listener)
            self.upgrades.append(upgrade)
            try:
                await upgrade.run()
            except SevhopError as err:
                if not self._goes_on_after(err):
                    self._over = True
            except BaseException:
                self._over = True
                raise

    def _goes_on_after(self, error: SevhopError) -> bool:
        return self._keep_going or (self._chosen and isinstance(error, Refused))
