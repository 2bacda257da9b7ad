"""
The results of a check: a tree of named tests, each PASS, FAIL or SKIP; every FAIL has a hint what to do.

A test whose parent has failed is skipped: its result would mean nothing.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field


class Status(enum.Enum):
    """The result of one test."""

    PASS = "pass"
    FAIL = "fail"
    SKIP = "skip"


@dataclass
class CheckResult:
    """
    The result of one test, and those that depend on it.

    :ivar detail: what was found, in a few words.
    :ivar hint: for a FAIL, what to do; for a PASS with a disadvantage, how to do without it.
    :ivar restart: for a FAIL, whether it passes only when the guest was shut down and started again.
    """

    name: str
    status: Status
    detail: str = ""
    hint: str = ""
    children: list[CheckResult] = field(default_factory=list)
    restart: bool = False

    def walk(self, depth: int = 0) -> Iterator[tuple[int, CheckResult]]:
        """The tree, parents before children, with depth."""
        yield depth, self
        for child in self.children:
            yield from child.walk(depth + 1)

    def failures(self) -> list[CheckResult]:
        """All that failed."""
        return [result for _, result in self.walk() if result.status is Status.FAIL]

    def restart_failure(self) -> CheckResult | None:
        """The first that failed and passes only when the guest was shut down and started again."""
        return next((failure for failure in self.failures() if failure.restart), None)

    @property
    def reason(self) -> str:
        """Why a guest cannot hop, in one line; of a FAIL."""
        return f"{self.name}: {self.detail}"

    def as_json(self) -> dict[str, object]:
        """For ``--json``."""
        return {
            "name": self.name,
            "status": self.status.value,
            "detail": self.detail,
            "hint": self.hint,
            "restart_required": self.restart,
            "children": [child.as_json() for child in self.children],
        }


def passed(name: str, detail: str = "", *children: CheckResult) -> CheckResult:
    """A test that passed, with those that depend on it."""
    return CheckResult(name, Status.PASS, detail, children=list(children))


def failed(
    name: str, detail: str, hint: str = "", skipped: tuple[str, ...] = (), *, restart: bool = False
) -> CheckResult:
    """A test that failed, with the names of those that are skipped for it."""
    children = [CheckResult(child, Status.SKIP) for child in skipped]
    return CheckResult(name, Status.FAIL, detail, hint, children, restart)
