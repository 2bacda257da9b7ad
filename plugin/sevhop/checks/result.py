"""
What a check finds: a tree of named tests, each PASS, FAIL or SKIP; every FAIL says what to do.

A test whose parent has failed is skipped: its answer would mean nothing.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field


class Status(enum.Enum):
    """How a test came out."""

    PASS = "pass"
    FAIL = "fail"
    SKIP = "skip"


@dataclass
class Finding:
    """
    One test and what depends on it.

    :ivar detail: what was found, in a few words.
    :ivar remedy: for a FAIL, what to do.
    """

    name: str
    status: Status
    detail: str = ""
    remedy: str = ""
    children: list[Finding] = field(default_factory=list)

    def walk(self, depth: int = 0) -> Iterator[tuple[int, Finding]]:
        """The tree, parents before children, with depth."""
        yield depth, self
        for child in self.children:
            yield from child.walk(depth + 1)

    def failures(self) -> list[Finding]:
        """All that failed."""
        return [finding for _, finding in self.walk() if finding.status is Status.FAIL]

    def as_json(self) -> dict[str, object]:
        """For ``--json``."""
        return {
            "name": self.name,
            "status": self.status.value,
            "detail": self.detail,
            "remedy": self.remedy,
            "children": [child.as_json() for child in self.children],
        }


def passed(name: str, detail: str = "", *children: Finding) -> Finding:
    """A test that passed, with those that depend on it."""
    return Finding(name, Status.PASS, detail, children=list(children))


def failed(name: str, detail: str, remedy: str = "", skipped: tuple[str, ...] = ()) -> Finding:
    """A test that failed, with the names of those that are skipped for it."""
    return Finding(name, Status.FAIL, detail, remedy, [Finding(child, Status.SKIP) for child in skipped])
