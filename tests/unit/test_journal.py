"""The journal: durable before anything is done, locked while somebody is at it, readable whatever has been torn."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
from sevhop.records import journal
from sevhop.records.journal import Entry, HopBrokenOff, Journal, JournalError, Process
from sevhop.records.run_directory import HopUnderWay
from sevhop_qmp.process import QemuProcess


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(journal, "DIRECTORY", tmp_path / "state" / "journal")
    return tmp_path / "state" / "journal"


def entry() -> Entry:
    return Entry(kind="domain", guest="web", uuid="4711", context="sev", running=True, source=Process(7, 8), new="/q")


def test_what_was_written_is_read() -> None:
    mine = Journal.begin(entry())
    mine.write({"phase": "prepare"})
    mine.write({"destination": Process(9, 10), "plates": {"sockets": [["a", "b"]], "pidfile": None}})
    assert journal.read(mine.path) == mine.entry
    assert mine.entry == dataclasses.replace(
        entry(), phase="prepare", destination=Process(9, 10), plates={"sockets": [["a", "b"]], "pidfile": None}
    )
    mine.end()
    assert list(journal.journals()) == []


def test_it_is_on_the_disk_before_anything_is_done(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    mine = Journal.begin(entry())
    assert done == ["True", "name", "directory"]
    mine.end()
    assert done[-1] == "directory"


def test_records_reach_the_disk_too(monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[bytes] = []
    monkeypatch.setattr(os, "fdatasync", lambda fd: flushed.append(os.pread(fd, 4096, 0).rstrip(b"\0")))
    mine = Journal.begin(entry())
    mine.write({"phase": "freeze"})
    mine.leave()
    assert b'"freeze"' in flushed[-1]


def test_one_hop_at_a_time() -> None:
    mine = Journal.begin(entry())
    with pytest.raises(HopUnderWay, match=f"process {os.getpid()} is hopping web"):
        Journal.begin(entry())
    with pytest.raises(HopUnderWay):
        Journal.take_over(mine.path)
    mine.end()
    Journal.begin(entry()).end()


def test_what_was_broken_off_must_be_recovered_first() -> None:
    mine = Journal.begin(entry())
    mine.write({"phase": "save"})
    mine.leave()
    with pytest.raises(HopBrokenOff, match=r"not finished, it stands at save .*sevhop recover"):
        Journal.begin(entry())
    taken = Journal.take_over(mine.path)
    assert taken.entry.phase == "save"
    taken.write({"phase": "commit"})
    taken.leave()
    assert journal.read(mine.path).phase == "commit"


def test_the_destination_of_a_hop_is_the_same_guest() -> None:
    mine = Journal.begin(entry())
    mine.write({"destination": Process(9, 10)})
    mine.leave()
    for guest in (Process(7, 8), Process(9, 10), "4711"):
        with pytest.raises(HopBrokenOff):
            journal.expect_none(guest)
    journal.expect_none(Process(9, 11))
    journal.expect_none("4712")
    with pytest.raises(HopBrokenOff):
        Journal.begin(dataclasses.replace(entry(), kind="bare", source=Process(9, 10)))


@pytest.mark.parametrize("cut", [1, 5, 15])
def test_a_torn_last_line_is_ignored(cut: int) -> None:
    mine = Journal.begin(entry())
    mine.write({"phase": "freeze"})
    mine.write({"phase": "share"})
    mine.leave()
    raw = mine.path.read_bytes()
    mine.path.write_bytes(raw.rstrip(b"\0")[:-cut] + bytes(100))
    taken = Journal.take_over(mine.path)
    assert taken.entry.phase == "freeze"
    taken.write({"phase": "load"})
    assert journal.read(mine.path).phase == "load"
    taken.end()


@pytest.mark.parametrize(
    "text",
    [b"", b"\n", b"[]\n", b"{}\n", b'{"version": 2}\n', b'{"version": 1}\n', b"\xff\n", b'{"version": 1, "source": 3}'],
)
def test_garbage_is_told(text: bytes, directory: Path) -> None:
    directory.mkdir(parents=True)
    path = directory / "domain-1.journal"
    path.write_bytes(text)
    with pytest.raises(JournalError):
        journal.read(path)
    with pytest.raises(JournalError):
        Journal.take_over(path)


def test_a_fact_that_is_none() -> None:
    mine = Journal.begin(entry())
    mine.leave()
    with mine.path.open("r+b") as file:
        file.seek(len(file.read().rstrip(b"\0")))
        file.write(b'{"colour": "red"}\n')
    with pytest.raises(JournalError, match="something unknown"):
        journal.read(mine.path)


def test_a_full_disk_is_found_at_once(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(JournalError, match="No space left"):
        Journal.begin(entry())
    assert os.listdir(directory) == []


def test_only_root_may_look(directory: Path) -> None:
    mine = Journal.begin(entry())
    assert directory.stat().st_mode & 0o777 == 0o700
    assert mine.path.stat().st_mode & 0o777 == 0o600
    mine.end()


def test_leftovers_of_a_command_that_died_early(directory: Path) -> None:
    mine = Journal.begin(entry())
    (directory / ".0123").write_bytes(b"")
    journal.remove_unfinished()
    assert os.listdir(directory) == [mine.path.name]
    mine.end()


def test_a_process_is_told_from_another_with_its_pid() -> None:
    process = QemuProcess.open(os.getpid())
    this = Process.of(process)
    process.close()
    found = this.open()
    assert found is not None
    found.close()
    assert Process(this.pid, this.started + 1).open() is None
    assert Process(2**22 - 1, 1).open() is None
