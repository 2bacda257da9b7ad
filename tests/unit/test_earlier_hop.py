"""A check of a guest whose last hop is not finished: it would be refused, so the check fails."""

from __future__ import annotations

from pathlib import Path

import pytest
from sevhop.checks import earlier_hop
from sevhop.checks.result import passed
from sevhop.records import journal
from sevhop.records.hop_record import HopRecord, Process
from sevhop.records.journal import Journal

SOURCE = Process(1 << 22, 1)
STANDALONE = HopRecord("standalone", "vm", "none", True, SOURCE, monitor="/run/qmp", phase="prepare")
DOMAIN = HopRecord("domain", "web", "none", True, SOURCE, uuid="4711", phase="retire")


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no journal yet."""
    monkeypatch.setattr(journal, "DIRECTORY", tmp_path / "journal")


@pytest.mark.parametrize(
    ("record", "known_as"), [(STANDALONE, SOURCE), (STANDALONE, "/run/qmp"), (DOMAIN, "4711")], ids=str
)
def test_check_fails_with_what_to_do(record: HopRecord, known_as: Process | str) -> None:
    Journal.begin(record).leave()
    (found,) = earlier_hop.add(passed("guest"), Process(1 << 21, 1), known_as).failures()
    assert found.hint == f"run: sevhop recover {record.guest}"
    assert f'interrupted in phase "{record.phase}"' in found.detail


def test_check_fails_as_long_as_another_command_hops_the_guest() -> None:
    mine = Journal.begin(STANDALONE)
    (found,) = earlier_hop.add(passed("guest"), SOURCE).failures()
    assert found.hint == "wait for it; see sevhop status"
    mine.end()


def test_check_has_no_word_of_it_otherwise() -> None:
    Journal.begin(DOMAIN).leave()
    assert earlier_hop.add(passed("guest"), "another", Process(1 << 21, 1)).children == []
