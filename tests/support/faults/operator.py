"""
An operator: somebody who does something to a guest in the middle of its hop, and does not know of that.

What came of it is written to a file at once, since a fault may end the program that hops.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Self, TypeAlias

from sevhop_qmp.errors import SevhopError

from tests.support.guests.domain_life import DomainLife, Done, VirshFailed
from tests.support.guests.life import Changed, Facts, Life, NotNow, applied, differences

#: A guest outside libvirt, or a domain.
Kind: TypeAlias = Literal["standalone", "domain"]

#: Seconds in which a QEMU must answer: one that is halted does not. And in which libvirt must, that may wait for one.
_PATIENCE = 2.0
_LIBVIRT_PATIENCE = 6.0

#: Of which facts it is not known what became of them, when something was not done in full.
_DISK = ("file disk", "file vda", "open virtio-disk0")
_SPARE = ("file spare", "device spare", "file sdc", "open scsi0-0-0-2")
_CARDS = ("device card", "device entropy", "device rng", "device 52:54:00:5e")
_TOUCHED = {
    "snapshot": _DISK,
    "commit": _DISK,
    "medium": ("file cd0", "file sdb", "open scsi0-0-0-1"),
    "plug_disk": _SPARE,
    "unplug_disk": _SPARE,
    "plug_card": _CARDS,
    "unplug_card": _CARDS,
    "unplug_card_again": _CARDS,
    "throttle": ("throttle",),
    "bitmap": ("bitmap",),
    "remove_bitmap": ("bitmap",),
    "pin": ("affinity",),
    "stop": ("status",),
    "cont": ("status",),
}


@dataclass(frozen=True)
class Operator:
    """
    What is done, and where.

    :ivar point: of the hop, see :mod:`.fault`.
    :ivar what: to the guest, see :meth:`tests.support.guests.life.Life.do`.
    :ivar seed: of what it chooses.
    :ivar kind: of the guest.
    :ivar guest: outside libvirt the directory of its machine; a domain's name.
    :ivar answer: the file for what came of it.
    """

    point: str
    what: str
    seed: int
    kind: Kind
    guest: str
    answer: str

    @classmethod
    def parsed(cls, text: str) -> Self:
        """From the words of a command line."""
        return cls(**json.loads(text))

    def __str__(self) -> str:
        return json.dumps(asdict(self))

    def at(self, point: str) -> None:
        """The hop is at some point; if it is this operator's it does its work, and all waits for it."""
        if point == self.point and not Path(self.answer).exists():
            thread = threading.Thread(target=self._work)
            thread.start()
            thread.join()

    def _work(self) -> None:
        changed: Changed | None = None
        choices = random.Random(self.seed)
        try:
            match self.kind:
                case "standalone":
                    changed = asyncio.run(Life(Path(self.guest), choices).done(self.what, _PATIENCE))
                case "domain":
                    changed = DomainLife(_run, self.guest, choices).do(self.what)
        except NotNow:
            changed = {}
        except (SevhopError, VirshFailed, OSError, subprocess.TimeoutExpired):
            pass
        Path(self.answer).write_text(json.dumps(changed), encoding="utf-8")

    def done_in_full(self) -> bool:
        """Whether it is known what came of it."""
        return self._changed() is not None

    def _changed(self) -> Changed | None:
        try:
            changed: Changed | None = json.loads(Path(self.answer).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}  # the hop did not come to that point
        return changed

    def wrong(self, before: Facts, after: Facts) -> list[str]:
        """
        In what a guest is not what it should be after the hop.

        :param before: what it was when the hop began.
        """
        changed = self._changed()
        if changed is not None:
            return differences(applied(before, changed), after)
        return differences(self._others(before), self._others(after))

    def _others(self, facts: Facts) -> Facts:
        return {name: value for name, value in facts.items() if not name.startswith(_TOUCHED[self.what])}


def _run(*words: str) -> Done:
    return subprocess.run(words, capture_output=True, text=True, timeout=_LIBVIRT_PATIENCE, check=False)
