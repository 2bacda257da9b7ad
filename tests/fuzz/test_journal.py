"""The journal: one that is damaged is refused in one way, and a record that is read has valid fields."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from sevhop.engine.guest_paths import GuestPaths
from sevhop.records import journal
from sevhop.records.hop_record import HopRecord, Process
from sevhop.records.journal import JournalError

from .inputs import fuzzed, json_values, raw, texts

RECORD = asdict(
    HopRecord("standalone", "gäst", "none", True, Process(1, 2), destination=Process(3, 4), monitor="/run/qmp")
)
FIELDS: dict[str, Any] = {"phase": "commit", "committed": True, "destination": {"pid": 5, "started": 6}}
WHOLE = b"".join(json.dumps(line).encode() + b"\n" for line in (RECORD, FIELDS)) + bytes(64)
names = st.one_of(st.sampled_from(sorted(RECORD)), texts)


def read(content: bytes) -> HopRecord | None:
    """The record; None if it is refused."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        try:
            return journal.read(Path(file.name))
        except JournalError:
            return None


def assert_usable(record: HopRecord) -> None:
    """What ``sevhop recover`` does with one whose processes have exited."""
    assert isinstance(record.this_boot, bool)
    assert record.key
    for process in (record.source, record.destination):
        if process is not None and (opened := process.open()) is not None:
            opened.close()
    Path(record.directory).exists()
    json.dumps(asdict(record))


def test_read_returns_the_record_of_a_whole_journal() -> None:
    record = read(WHOLE)
    assert record is not None
    assert (record.guest, record.phase, record.destination) == ("gäst", "commit", Process(5, 6))


@fuzzed(
    content=st.one_of(
        raw,
        st.tuples(st.integers(0, len(WHOLE)), raw, st.integers(0, 40)).map(
            lambda cut: WHOLE[: cut[0]] + cut[1] + WHOLE[cut[0] + cut[2] :]
        ),
    )
)
def test_read_is_robust_against_any_bytes(content: bytes) -> None:
    if (record := read(content)) is not None:
        assert_usable(record)


any_fields = st.dictionaries(names, json_values, max_size=3)


@fuzzed(first=any_fields, then=st.lists(any_fields, max_size=2))
def test_read_is_robust_against_any_fields(first: dict[str, Any], then: list[dict[str, Any]]) -> None:
    lines = [RECORD | first, *then]
    if (record := read(b"".join(json.dumps(line).encode() + b"\n" for line in lines))) is not None:
        assert_usable(record)


@fuzzed(guest_paths=json_values)
def test_guest_paths_are_robust_against_any_json(guest_paths: Any) -> None:
    try:
        GuestPaths.from_fields(guest_paths)
    except (ValueError, TypeError, KeyError):
        return


@pytest.mark.parametrize("pid", [0, -1, 1 << 70, "1", None, 1.5])
def test_read_refuses_an_invalid_pid(pid: object) -> None:
    """It was accepted, and sevhop recover ended with a traceback."""
    assert read(json.dumps(RECORD | {"source": {"pid": pid, "started": 1}}).encode() + b"\n") is None
