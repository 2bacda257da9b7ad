"""Sockets and pid files get their names back as root, in directories that somebody else may write to."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from sevhop.engine.guest_paths import GuestPaths


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "vm").mkdir()
    return tmp_path / "vm"


@pytest.fixture
def listener(directory: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(directory / "qmp"))
        sock.listen()
        yield sock


def guest_paths(directory: Path) -> GuestPaths:
    """As they are when they have been through the journal."""
    pidfile = ("pid.hop-01234567", "pid")
    first = GuestPaths.of(str(directory), [(int(socket.AF_UNIX), "qmp")], pidfile)
    return GuestPaths.from_fields(first.as_fields())


def exchange(directory: Path, other: Path) -> None:
    """Its owner puts a link to another directory in its place."""
    directory.rename(directory.with_name("moved"))
    directory.symlink_to(other)


def reached(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(str(path)) == 0


def test_socket_and_pid_file_of_the_source_become_the_destinations(directory: Path, listener: socket.socket) -> None:
    (directory / "pid").write_text("1\n")
    mine = guest_paths(directory)
    mine.link()
    (directory / "qmp").unlink()  # as QEMU does when it exits
    (directory / "pid.hop-01234567").write_text("2\n")
    assert mine.publish() == []
    assert reached(directory / "qmp")
    assert (directory / "pid").read_text() == "2\n"
    assert sorted(os.listdir(directory)) == ["pid", "qmp"]
    assert mine.publish() == []  # once more, as sevhop recover does


def test_paths_stay_if_the_source_exited_unexpectedly(directory: Path, listener: socket.socket) -> None:
    mine = guest_paths(directory)
    mine.link()
    assert mine.publish() == []
    assert os.listdir(directory) == ["qmp"]


def test_discard_removes_links_and_new_pid_file(directory: Path, listener: socket.socket) -> None:
    mine = guest_paths(directory)
    mine.link()
    (directory / "pid.hop-01234567").write_text("2\n")
    mine.discard()
    assert os.listdir(directory) == ["qmp"]


def test_replaced_directory_is_not_touched(directory: Path, listener: socket.socket, tmp_path: Path) -> None:
    """Otherwise its owner could have root put files of his into a directory of root's."""
    mine = guest_paths(directory)
    mine.link()
    spare = Path(mine.sockets[0][1]).name
    others = tmp_path / "others"
    others.mkdir()
    for name in (spare, "pid.hop-01234567"):
        (others / name).write_text("planted\n")
    exchange(directory, others)
    notes = mine.publish()
    mine.discard()
    assert len(notes) == 2
    assert all("another process has replaced the directory" in note for note in notes)
    assert sorted(os.listdir(others)) == sorted([spare, "pid.hop-01234567"])


def test_replaced_second_link_is_not_renamed(directory: Path, listener: socket.socket) -> None:
    mine = guest_paths(directory)
    mine.link()
    spare = Path(mine.sockets[0][1])
    spare.unlink()
    spare.write_text("planted\n")
    (directory / "qmp").unlink()
    (note,) = mine.publish()
    assert "another process has replaced" in note
    assert not (directory / "qmp").exists()


def test_replaced_socket_is_not_linked(directory: Path, listener: socket.socket) -> None:
    mine = guest_paths(directory)
    (directory / "qmp").unlink()
    (directory / "qmp").write_text("somebody else's\n")
    mine.link()
    assert os.listdir(directory) == ["qmp"]


def test_file_that_is_not_the_sources_pid_file_is_not_replaced(directory: Path) -> None:
    """In a sticky directory its owner may not do that himself."""
    (directory / "pid").write_text("1\n")
    mine = guest_paths(directory)
    (directory / "kept").write_text("somebody else's\n")
    (directory / "kept").rename(directory / "pid")
    (directory / "pid.hop-01234567").write_text("2\n")
    (note,) = mine.publish()
    assert "another process has replaced" in note
    assert (directory / "pid").read_text() == "somebody else's\n"


def test_link_in_the_place_of_the_new_pid_file_gets_no_name(directory: Path) -> None:
    mine = guest_paths(directory)
    (directory / "pid.hop-01234567").symlink_to("/etc/passwd")
    (note,) = mine.publish()
    assert "is not a regular file any more" in note
    assert not (directory / "pid").exists()
