"""A guest that has lived when it hops (:mod:`tests.support.guests.life`), and must be what it was afterwards."""

from __future__ import annotations

import random

from tests.support.guests.life import Facts, Life, NotNow, differences
from tests.support.guests.running import Guest


class LivedInGuest(Guest):
    """
    Use :meth:`of`, with a guest of :func:`tests.support.guests.life.lived_in`.

    :ivar life: what is done to it.
    """

    life: Life
    _facts: Facts

    @classmethod
    def of(cls, guest: Guest, *without: str) -> LivedInGuest:
        """
        Everything happens to the guest once.

        :param without: but for these, see :meth:`tests.support.guests.life.Life.do`.
        """
        self = cls(guest.machine, guest.process)
        self.life = Life(guest.machine.directory, random.Random(guest.machine.directory.name))
        for what in (*self.life.ALL, "stop", "cont"):
            if what not in without:
                try:
                    self.life.do(what)
                except NotNow as err:
                    raise AssertionError(f"{what}: {err}") from err
        self._facts = self.life.facts()
        return self

    def see_unchanged(self) -> None:
        """It is what it was."""
        assert differences(self._facts, self.life.facts()) == []
