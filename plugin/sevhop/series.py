"""
Upgrades of several domains, one after the other.

An upgrade that fails ends the series, and so does a domain that was named and is refused. Where domains were chosen by
a rule instead (all, or all that are outdated), one that is refused ends nothing: it was not touched, and nobody has
said that it can hop. An interruption ends the series after the domain that it has met, whatever was asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from sevhop_qmp.errors import SevhopError

from .domain import Connection
from .errors import Refused
from .procedure import Progress
from .status import survey
from .upgrade import Options, Upgrade

#: Told of every upgrade when it is over, with the error that it has ended with, if any.
Ended = Callable[[Upgrade, SevhopError | None], None]


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


class Series:
    """
    A series of upgrades. :meth:`run` it once; :meth:`interrupt` may be called from a signal handler meanwhile.

    :ivar upgrades: those that were begun.
    """

    def __init__(
        self,
        uri: str,
        names: Sequence[str],
        options: Options,
        *,
        chosen: bool = False,
        keep_going: bool = False,
        progress: Progress = lambda _: None,
        ended: Ended = lambda *_: None,
    ) -> None:
        """
        :param chosen: whether the domains were chosen by a rule, not named.
        :param keep_going: go on with the next domain when one fails or is refused.
        """
        self.upgrades: list[Upgrade] = []
        self._uri = uri
        self._names = list(names)
        self._options = options
        self._chosen = chosen
        self._keep_going = keep_going
        self._progress = progress
        self._ended = ended
        self._interrupted = False

    async def run(self) -> None:
        """Upgrade. Errors of single upgrades are told to ``ended``."""
        for name in self._names:
            upgrade = Upgrade(self._uri, name, self._options, self._progress)
            self.upgrades.append(upgrade)
            error = None
            try:
                await upgrade.run()
            except SevhopError as err:
                error = err
            self._ended(upgrade, error)
            if self._interrupted or (error is not None and not self._goes_on_after(error)):
                return

    def interrupt(self) -> bool:
        """Undo the upgrade that is under way, if it still can be undone, and begin no other."""
        self._interrupted = True
        return bool(self.upgrades) and self.upgrades[-1].interrupt()

    def summary(self) -> str:
        """How many domains came to what, in one line."""
        outcomes = Counter(upgrade.report.outcome for upgrade in self.upgrades)
        if left := len(self._names) - len(self.upgrades):
            outcomes["not tried"] = left
        return f"{len(self._names)} domains: " + ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())

    def _goes_on_after(self, error: SevhopError) -> bool:
        return self._keep_going or (self._chosen and isinstance(error, Refused))
