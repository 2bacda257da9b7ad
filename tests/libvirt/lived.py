"""
A domain that has lived when it is upgraded (:mod:`tests.support.guests.domain_life`), and must be what it was
afterwards.
"""

from __future__ import annotations

import random

from tests.support.guests import domain_life
from tests.support.guests.daemon import Daemon, DomainGuest
from tests.support.guests.domain_life import DomainLife
from tests.support.guests.life import differences

from .conftest import StartDomain


class LivedInDomain(DomainGuest):
    """
    Use :meth:`started`.

    :ivar life: what is done to it.
    """

    life: DomainLife

    @classmethod
    def started(
        cls, daemon: Daemon, start: StartDomain, name: str, *, more: str = "", **fields: object
    ) -> LivedInDomain:
        """
        Start a domain to which everything happens once.

        :param more: further devices.
        :param fields: see :data:`.conftest.StartDomain`.
        """
        domain_life.make_files(daemon.run, name)
        start(name=name, more=domain_life.devices(name) + more, **fields)
        self = cls(daemon, name)
        self.life = DomainLife(daemon.run, name, random.Random(name))
        self.wait_for_ticks(3)
        self.life.live()
        self.remember()
        return self

    def remember(self) -> None:
        """What it is now is what it is to be."""
        self._facts = self.life.facts()

    def see_unchanged(self) -> None:
        """It is what it was."""
        assert differences(self._facts, self.life.facts()) == []
