"""What became of the definitions that were prepared (:mod:`sevhop.engine.preparation`)."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class PreparedDefinition:
    """
    What became of the definition of a domain.

    :ivar domain: its name.
    :ivar outcome: ``done``, ``unchanged`` if there was nothing to change, ``checked`` in a dry run if there is
        something, or ``refused``.
    :ivar changes: each in a few words.
    :ivar diff: unified, of the definition without its passwords.
    :ivar active: whether it has a guest now, which the changes do not reach.
    :ivar restart_required: why that guest cannot hop until it was shut down and started again; empty if it can, or
        something else prevents it.
    :ivar notes: what keeps its guest from hopping, or makes it hop with a disadvantage, and was not changed.
    :ivar reason: why it was refused.
    :ivar hint: what to do.
    """

    domain: str
    outcome: str
    changes: tuple[str, ...] = ()
    diff: str = ""
    active: bool = False
    restart_required: str = ""
    notes: tuple[str, ...] = ()
    reason: str = ""
    hint: str = ""

    def as_json(self) -> dict[str, object]:
        """For ``--json``."""
        return asdict(self)

    def __str__(self) -> str:
        """For people: the diff, a line, and one for each note."""
        if self.reason:
            return f"{self.domain}: {self.reason}{f' ({self.hint})' if self.hint else ''}; nothing was touched"
        words = {"done": "prepared", "checked": "would be prepared", "unchanged": "nothing to change"}
        line = f"{self.domain}: {words[self.outcome]}"
        line += f": {', '.join(self.changes)}" if self.changes else ""
        if self.restart_required:
            line += f"; cannot hop until it is shut down and started again: {self.restart_required}"
        return "\n".join([*self.diff.splitlines(), line, *(f"note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class Preparations:
    """
    What became of several.

    :ivar domains: those that were selected or named.
    :ivar excluded: names of others that would have been selected.
    """

    domains: tuple[PreparedDefinition, ...]
    excluded: tuple[str, ...] = ()
