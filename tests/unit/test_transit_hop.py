"""The journal of a hop into a transit is another one's; what is made for the transit is recorded before."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sevhop.engine.transaction import CommitState
from sevhop.engine.transit_command_line import Untransitable
from sevhop.engine.transit_hop import TransitHop
from sevhop.errors import GuestState
from sevhop.process.apparmor_profile import ProfileCopy
from sevhop.records.journal import JournalError
from sevhop_qmp.errors import SevhopError

CONFINED = "libvirt-11111111-2222-3333-4444-555555555501 (enforce)"


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


class Confined:
    """The domain's QEMU."""

    def __init__(self, confinement: str) -> None:
        self.confinement = confinement


def profile(hop: TransitHop, confinement: str) -> ProfileCopy | None:
    """Have the transit's profile loaded."""
    source: Any = Confined(confinement)
    return asyncio.run(hop._profile(source))


def test_profile_is_recorded_before_it_is_loaded_and_removed_in_a_rollback(monkeypatch: pytest.MonkeyPatch) -> None:
    subject: Any = Subject()
    done: list[object] = []
    monkeypatch.setattr(ProfileCopy, "load", lambda self: done.append("load"))
    monkeypatch.setattr(ProfileCopy, "remove", lambda self: done.append(f"remove {self.label.profile}"))
    hop = TransitHop(subject, recorder=lambda **fields: done.append(fields))
    found = profile(hop, CONFINED)
    assert found is not None
    assert done == [{"apparmor_profile": found.label.profile}, "load"]
    asyncio.run(hop.rollback.unwind())
    assert done[2:] == [f"remove {found.label.profile}"]


def test_nothing_is_loaded_for_a_source_without_a_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    subject: Any = Subject()
    monkeypatch.delattr(ProfileCopy, "load")
    assert profile(TransitHop(subject), "unconfined") is None
    assert profile(TransitHop(subject), "system_u:system_r:svirt_t:s0:c1,c2") is None


def test_domain_is_not_carried_if_its_profile_cannot_be_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    subject: Any = Subject()

    def fail(self: ProfileCopy) -> None:
        raise SevhopError("cannot run apparmor_parser")

    monkeypatch.setattr(ProfileCopy, "load", fail)
    with pytest.raises(Untransitable, match=r"confined .*: cannot run apparmor_parser"):
        profile(TransitHop(subject), CONFINED)
    with pytest.raises(Untransitable, match="my-profile"):
        profile(TransitHop(subject), "my-profile (enforce)")
