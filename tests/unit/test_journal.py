"""The journal: durable before anything is done, locked during a hop, readable if its last line is torn."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import pytest
from sevhop.records import journal
from sevhop.records.hop_record import VERSION, HopRecord, Process
from sevhop.records.journal import HopInterrupted, Journal, JournalError
from sevhop.records.run_directory import HopInProgress
from sevhop_qmp.process import QemuProcess


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(journal, "DIRECTORY", tmp_path / "state" / "journal")
    return tmp_path / "state" / "journal"


def record() -> HopRecord:
    return HopRecord(
        kind="domain", guest="web", uuid="4711", context="sev", running=True, source=Process(7, 8), new="/q", began=1.0
    )


def test_read_returns_what_was_written() -> None:
    mine = Journal.begin(record())
    mine.write({"phase": "prepare"})
    mine.write({"destination": Process(9, 10), "guest_paths": {"sockets": [["a", "b"]], "pidfile": None}})
    assert journal.read(mine.path) == mine.record
    assert mine.record == dataclasses.replace(
        record(), phase="prepare", destination=Process(9, 10), guest_paths={"sockets": [["a", "b"]], "pidfile": None}
    )
    mine.end()
    assert list(journal.journals()) == []


def test_journal_begin_syncs_file_name_and_directory(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file first, then its name, then the directory's list of names: in any other order a crash could lose it."""
    done: list[str] = []
    fsync, link = os.fsync, os.link

    def synced(fd: int) -> None:
        target = os.readlink(f"/proc/self/fd/{fd}")
        done.append("directory" if target == str(directory) else f"{len(os.pread(fd, 4096, 0).rstrip(bytes(1))) > 2}")
        fsync(fd)

    def linked(old: Path, new: Path) -> None:
        done.append("name")
        link(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "link", linked)
    mine = Journal.begin(record())
    assert done == ["True", "name", "directory"]
    mine.end()
    assert done[-1] == "directory"


def test_line_is_flushed_after_write(monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[bytes] = []
    monkeypatch.setattr(os, "fdatasync", lambda fd: flushed.append(os.pread(fd, 4096, 0).rstrip(b"\0")))
    mine = Journal.begin(record())
    mine.write({"phase": "stop"})
    mine.leave()
    assert b'"stop"' in flushed[-1]


def test_journal_begin_refuses_a_second_hop() -> None:
    mine = Journal.begin(record())
    with pytest.raises(HopInProgress, match=f"process {os.getpid()} is hopping web"):
        Journal.begin(record())
    with pytest.raises(HopInProgress):
        Journal.take_over(mine.path)
    mine.end()
    Journal.begin(record()).end()


def test_journal_begin_refuses_after_an_interrupted_hop() -> None:
    mine = Journal.begin(record())
    mine.write({"phase": "save"})
    mine.leave()
    with pytest.raises(HopInterrupted, match=r"was interrupted in phase \"save\" \(run: sevhop recover web\)"):
        Journal.begin(record())
    taken = Journal.take_over(mine.path)
    assert taken.record.phase == "save"
    taken.write({"phase": "commit"})
    taken.leave()
    assert journal.read(mine.path).phase == "commit"


def test_journal_begin_refuses_after_a_prepared_upgrade_which_was_not_interrupted() -> None:
    mine = Journal.begin(record())
    mine.write({"phase": "prepared"})
    mine.leave()
    with pytest.raises(HopInterrupted, match=r"an upgrade of web was prepared, .* \(run: sevhop recover web\)"):
        Journal.begin(record())


def test_expect_none_knows_source_destination_and_uuid() -> None:
    mine = Journal.begin(record())
    mine.write({"destination": Process(9, 10)})
    mine.leave()
    for guest in (Process(7, 8), Process(9, 10), "4711"):
        with pytest.raises(HopInterrupted):
            journal.expect_none(guest)
    journal.expect_none(Process(9, 11))
    journal.expect_none("4712")
    with pytest.raises(HopInterrupted):
        Journal.begin(dataclasses.replace(record(), kind="standalone", source=Process(9, 10)))


@pytest.mark.parametrize("cut", [1, 5, 15])
def test_take_over_ignores_a_torn_last_line(cut: int) -> None:
    mine = Journal.begin(record())
    mine.write({"phase": "stop"})
    mine.write({"phase": "map"})
    mine.leave()
    raw = mine.path.read_bytes()
    mine.path.write_bytes(raw.rstrip(b"\0")[:-cut] + bytes(100))
    taken = Journal.take_over(mine.path)
    assert taken.record.phase == "stop"
    taken.write({"phase": "load"})
    assert journal.read(mine.path).phase == "load"
    taken.end()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\n",
        b"[]\n",
        b"{}\n",
        f'{{"version": {VERSION + 1}}}\n'.encode(),
        f'{{"version": {VERSION}}}\n'.encode(),
        b"\xff\n",
        f'{{"version": {VERSION}, "source": 3}}'.encode(),
    ],
)
def test_read_refuses_garbage(text: bytes, directory: Path) -> None:
    directory.mkdir(parents=True)
    path = directory / "domain-1.journal"
    path.write_bytes(text)
    with pytest.raises(JournalError):
        journal.read(path)
    with pytest.raises(JournalError):
        Journal.take_over(path)


@pytest.mark.parametrize("version", [VERSION - 1, VERSION + 1])
def test_journal_of_another_version_is_refused_with_what_to_do(version: int, directory: Path) -> None:
    """That of an older one may lack fields; it is not reported as damaged."""
    directory.mkdir(parents=True)
    path = directory / "domain-4711.journal"
    fields = dataclasses.asdict(record()) | {"version": version}
    del fields["images"], fields["next_attempt"]
    path.write_text(json.dumps(fields) + "\n")
    for use in (journal.read, Journal.take_over):
        with pytest.raises(JournalError) as caught:
            use(path)
        assert str(caught.value) == (
            f"cannot read the journal {path}: its version {version} is not supported (recover with the version of "
            "sevhop that began the hop)"
        )


#: Of the versions of the format that there were, as far as they are known: a digest of the names and types.
FORMATS = {2: "acb551794627e0b5"}


def test_version_is_raised_with_the_fields() -> None:
    """Whoever changes a field raises the version, and adds the digest that this shows."""
    text = "\n".join(f"{one.name}: {one.type}" for cls in (HopRecord, Process) for one in dataclasses.fields(cls))
    assert FORMATS[VERSION] == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_read_refuses_an_unknown_field() -> None:
    mine = Journal.begin(record())
    mine.leave()
    with mine.path.open("r+b") as file:
        file.seek(len(file.read().rstrip(b"\0")))
        file.write(b'{"colour": "red"}\n')
    with pytest.raises(JournalError, match="invalid field"):
        journal.read(mine.path)


def test_journal_begin_fails_on_a_full_disk(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(JournalError, match="No space left"):
        Journal.begin(record())
    assert os.listdir(directory) == []


def test_journal_is_readable_by_root_only(directory: Path) -> None:
    mine = Journal.begin(record())
    assert directory.stat().st_mode & 0o777 == 0o700
    assert mine.path.stat().st_mode & 0o777 == 0o600
    mine.end()


def test_remove_unfinished_removes_temporary_files(directory: Path) -> None:
    mine = Journal.begin(record())
    (directory / ".0123").write_bytes(b"")
    journal.remove_unfinished()
    assert os.listdir(directory) == [mine.path.name]
    mine.end()


def test_process_is_distinguished_from_another_with_its_pid() -> None:
    process = QemuProcess.open(os.getpid())
    this = Process.of(process)
    process.close()
    found = this.open()
    assert found is not None
    found.close()
    assert Process(this.pid, this.started + 1).open() is None
    assert Process(2**22 - 1, 1).open() is None


def test_interrupted_hop_of_a_domain_is_unattended() -> None:
    mine = Journal.begin(record())
    assert journal.unattended() == []
    mine.leave()
    assert journal.unattended() == ["web"]
    mine.path.write_bytes(b"damaged\n")
    assert journal.unattended() == []


def test_hop_of_an_earlier_boot_is_not_unattended() -> None:
    mine = Journal.begin(dataclasses.replace(record(), boot="earlier"))
    mine.leave()
    assert journal.unattended() == []


def test_hop_outside_libvirt_is_not_of_a_domain() -> None:
    mine = Journal.begin(dataclasses.replace(record(), kind="standalone"))
    mine.leave()
    assert journal.unattended() == []
