"""Records for the journal of systemd, as a socket in its place receives them."""

from __future__ import annotations

import io
import socket
import struct
import syslog
from collections.abc import Iterator
from pathlib import Path

import pytest
from sevhop.engine.recovery_result import RecoveredGuest, RecoveryOutcome
from sevhop.events import HopFinished, PhaseBegan, PhaseEnded
from sevhop.observe import journald
from sevhop.report import Report


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A socket in the place of systemd-journald's."""
    monkeypatch.setattr(journald, "SOCKET", tmp_path / "socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as listener:
        listener.bind(str(journald.SOCKET))
        yield listener


def decoded(record: bytes) -> dict[str, str]:
    """The fields of a record (https://systemd.io/JOURNAL_NATIVE_PROTOCOL/)."""
    fields = {}
    stream = io.BytesIO(record)
    for line in stream:
        name, equals, value = line.rstrip(b"\n").partition(b"=")
        if not equals:
            (length,) = struct.unpack("<Q", stream.read(8))
            value = stream.read(length)
            assert stream.read(1) == b"\n"
        assert name.decode() not in fields
        fields[name.decode()] = value.decode()
    return fields


def test_phase_is_recorded(journal: socket.socket) -> None:
    records = journald.Records()
    records(PhaseBegan("web", "check"))
    records(PhaseEnded("web", "check", 12.3456))
    assert decoded(journal.recv(4096)) == {
        "SYSLOG_IDENTIFIER": "sevhop",
        "PRIORITY": str(syslog.LOG_INFO),
        "MESSAGE": "web: check took 12.3 ms",
        "MESSAGE_ID": journald.PHASE,
        "SEVHOP_GUEST": "web",
        "SEVHOP_PHASE": "check",
        "SEVHOP_MS": "12.346",
    }
    with pytest.raises(BlockingIOError):
        journal.recv(4096)
    records.close()


def test_outcome_is_recorded(journal: socket.socket) -> None:
    records = journald.Records()
    records(HopFinished("web", Report("web", outcome="done", downtime_ms=228.0, notes=["first", "second=2"])))
    fields = decoded(journal.recv(4096))
    assert fields["MESSAGE"].splitlines()[1:] == ["note: first", "note: second=2"]
    assert (fields["PRIORITY"], fields["SEVHOP_OUTCOME"], fields["SEVHOP_MS"]) == ("5", "done", "228.000")
    assert fields["MESSAGE_ID"] == journald.OUTCOME
    records(HopFinished("web", Report("web", outcome="recovery-required", reason="it \udcff\nSEVHOP_OUTCOME=done")))
    fields = decoded(journal.recv(4096))
    assert (fields["PRIORITY"], fields["SEVHOP_OUTCOME"]) == ("2", "recovery-required")
    assert fields["MESSAGE"] == "web: it \\udcff\nSEVHOP_OUTCOME=done"
    assert "SEVHOP_MS" not in fields
    records.close()


def test_recovery_is_recorded(journal: socket.socket) -> None:
    records = journald.Records()
    records.recovered(RecoveredGuest("web", RecoveryOutcome.DESTINATION, "a note", 7200.0))
    fields = decoded(journal.recv(4096))
    assert (fields["MESSAGE_ID"], fields["PRIORITY"]) == (journald.RECOVERY, "5")
    assert (fields["SEVHOP_GUEST"], fields["SEVHOP_RESULT"]) == ("web", "destination")
    assert fields["SEVHOP_MS"] == "7200.000"
    assert fields["MESSAGE"].startswith("web: runs in the new QEMU: a note")
    records.recovered(RecoveredGuest("web", RecoveryOutcome.MANUAL, "a reason"))
    fields = decoded(journal.recv(4096))
    assert (fields["PRIORITY"], fields["SEVHOP_RESULT"]) == ("2", "manual")
    assert "SEVHOP_MS" not in fields
    records.close()


@pytest.mark.parametrize("result", [RecoveryOutcome.IN_PROGRESS, RecoveryOutcome.POSTPONED])
def test_recovery_that_was_not_tried_is_not_recorded(journal: socket.socket, result: RecoveryOutcome) -> None:
    """The timer finds it each minute."""
    records = journald.Records()
    records.recovered(RecoveredGuest("web", result))
    with pytest.raises(BlockingIOError):
        journal.recv(4096)
    records.close()


def fill(records: journald.Records) -> int:
    """Write until the journal is busy. :return: how many records it has taken."""
    for number in range(10_000):
        records(PhaseEnded("web", str(number), 1.0))
        if records.unsent:
            return number
    raise AssertionError("the journal is never busy")


def test_busy_journal_is_not_waited_for(
    journal: socket.socket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither during a hop, nor for ever at the end."""
    monkeypatch.setattr(journald, "_SEND_TIMEOUT", 0.01)
    records = journald.Records()
    fill(records)
    records.close()
    assert "1 records were not written" in caplog.text


@pytest.mark.parametrize("when", ["with the next one", "at the end"])
def test_records_are_kept_while_the_journal_is_busy(journal: socket.socket, when: str) -> None:
    """They are sent later, in their order."""
    records = journald.Records()
    taken = fill(records)
    phases = [decoded(journal.recv(4096))["SEVHOP_PHASE"] for _ in range(taken)]
    if when == "with the next one":
        records(PhaseEnded("web", "last", 1.0))
        assert records.unsent == 0
    records.close()
    with pytest.raises(BlockingIOError):
        while True:
            phases.append(decoded(journal.recv(4096))["SEVHOP_PHASE"])
    assert phases == [*map(str, range(taken + 1)), *(["last"] if when == "with the next one" else [])]


def test_missing_journal_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journald, "SOCKET", tmp_path / "missing")
    records = journald.Records()
    records(PhaseEnded("web", "check", 1.0))
    records.close()
