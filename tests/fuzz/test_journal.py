"""The journal: one that is damaged is refused in one way, and what is read of another is what it should be."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from sevhop.engine.guest_paths import NamePlates
from sevhop.records import journal
from sevhop.records.journal import Entry, JournalError, Process

from .inputs import fuzzed, json_values, raw, texts

ENTRY = asdict(Entry("bare", "gäst", "none", True, Process(1, 2), destination=Process(3, 4), monitor="/run/qmp"))
FACTS: dict[str, Any] = {"phase": "commit", "committed": True, "destination": {"pid": 5, "started": 6}}
WHOLE = b"".join(json.dumps(line).encode() + b"\n" for line in (ENTRY, FACTS)) + bytes(64)
names = st.one_of(st.sampled_from(sorted(ENTRY)), texts)


def read(content: bytes) -> Entry | None:
    """What is read of it, if it is not refused."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        try:
            return journal.read(Path(file.name))
        except JournalError:
            return None


def assert_usable(entry: Entry) -> None:
    """What ``sevhop recover`` does with one whose processes have ended."""
    assert isinstance(entry.this_boot, bool)
    assert entry.key
    for process in (entry.source, entry.destination):
        if process is not None and (opened := process.open()) is not None:
            opened.close()
    Path(entry.directory).exists()
    json.dumps(asdict(entry))


def test_a_whole_one_is_read() -> None:
    entry = read(WHOLE)
    assert entry is not None
    assert (entry.guest, entry.phase, entry.destination) == ("gäst", "commit", Process(5, 6))


@fuzzed(
    content=st.one_of(
        raw,
        st.tuples(st.integers(0, len(WHOLE)), raw, st.integers(0, 40)).map(
            lambda cut: WHOLE[: cut[0]] + cut[1] + WHOLE[cut[0] + cut[2] :]
        ),
    )
)
def test_any_bytes(content: bytes) -> None:
    if (entry := read(content)) is not None:
        assert_usable(entry)


facts = st.dictionaries(names, json_values, max_size=3)


@fuzzed(first=facts, then=st.lists(facts, max_size=2))
def test_any_facts(first: dict[str, Any], then: list[dict[str, Any]]) -> None:
    lines = [ENTRY | first, *then]
    if (entry := read(b"".join(json.dumps(line).encode() + b"\n" for line in lines))) is not None:
        assert_usable(entry)


@fuzzed(plates=json_values)
def test_any_name_plates(plates: Any) -> None:
    try:
        NamePlates.from_facts(plates)
    except (ValueError, TypeError, KeyError):
        return


@pytest.mark.parametrize("pid", [0, -1, 1 << 70, "1", None, 1.5])
def test_a_pid_that_is_none(pid: object) -> None:
    """It was taken, and made a traceback of sevhop recover."""
    assert read(json.dumps(ENTRY | {"source": {"pid": pid, "started": 1}}).encode() + b"\n") is None
