"""The journal of a hop into a transit is another one's."""

from __future__ import annotations

from typing import Any

import pytest
from sevhop.engine.transaction import CommitState
from sevhop.engine.transit_hop import TransitHop
from sevhop.errors import GuestState
from sevhop.records.journal import JournalError


class Subject:
    """A domain, and its QEMU."""

    name = "web1"
    source = None

    @property
    def domain(self) -> Subject:
        return self


def test_fields_are_passed_on() -> None:
    subject: Any = Subject()
    found: list[dict[str, object]] = []
    hop = TransitHop(subject, recorder=lambda **fields: found.append(fields))
    hop.record(phase="stop", stopped=True)
    hop.commit(GuestState.RUNNING_IN_NEW)
    assert found == [{"phase": "stop", "stopped": True}, {"committed": True}]


def test_journal_that_fails_stops_a_hop_only_before_the_commit() -> None:
    def fail(**fields: object) -> None:
        raise JournalError("the journal cannot be written")

    subject: Any = Subject()
    hop = TransitHop(subject, recorder=fail)
    with pytest.raises(JournalError):
        hop.record(phase="stop")
    hop.commit(GuestState.RUNNING_IN_NEW)
    assert (hop.state, hop.report.notes) == (CommitState.COMMITTED, ["the journal cannot be written"])
