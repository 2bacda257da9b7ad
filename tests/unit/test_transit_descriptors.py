"""Descriptors that a transit inherits: files are opened by root, in directories that QEMU's user may write to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from sevhop.engine.transit_command_line import Untransitable
from sevhop.engine.transit_descriptors import InheritedDescriptors, namespaces_to_enter
from sevhop_qmp.process import QemuProcess


@pytest.fixture
def source() -> Iterator[QemuProcess]:
    """We ourselves."""
    process = QemuProcess.open(os.getpid())
    yield process
    process.close()


@pytest.fixture
def descriptors(source: QemuProcess) -> Iterator[InheritedDescriptors]:
    found = InheritedDescriptors(source)
    yield found
    found.close()


@pytest.fixture
def log(open_directory: Path) -> Path:
    """A log in a directory that everybody may write to."""
    os.chmod(open_directory, 0o777)
    path = open_directory / "log"
    path.write_text("one\n")
    return path


def test_file_that_the_source_writes_is_appended_to(descriptors: InheritedDescriptors, log: Path) -> None:
    with log.open("a"):
        number = descriptors.appending(str(log))
    assert os.get_blocking(number)
    assert descriptors.numbers == [number]
    os.write(number, b"two\n")
    assert log.read_text() == "one\ntwo\n"


def test_file_of_roots_is_appended_to(descriptors: InheritedDescriptors, log: Path) -> None:
    """virtlogd writes it."""
    os.chmod(log.parent, 0o755)
    os.write(descriptors.appending(str(log)), b"two\n")
    assert log.read_text() == "one\ntwo\n"


def test_file_that_others_may_have_put_there_is_not_opened(descriptors: InheritedDescriptors, log: Path) -> None:
    with log.open(), pytest.raises(Untransitable, match=f"everybody may write to {log.parent}"):
        descriptors.appending(str(log))


def test_other_files_are_not_opened(descriptors: InheritedDescriptors, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.touch()
    (tmp_path / "link").symlink_to(target)
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "link", tmp_path / "fifo", tmp_path / "absent", tmp_path, Path("/dev/null")):
        with pytest.raises(Untransitable):
            descriptors.appending(str(path))
    with pytest.raises(Untransitable, match="relative"):
        descriptors.appending("log")
    assert not (tmp_path / "absent").exists()


def test_descriptors_are_duplicated_and_closed(source: QemuProcess) -> None:
    found = InheritedDescriptors(source)
    read, write = os.pipe()
    number = found.duplicate(read)
    assert os.path.sameopenfile(number, read) and number != read
    found.close()
    with pytest.raises(OSError):
        os.fstat(number)
    os.close(read)
    os.close(write)


def test_namespaces_that_we_are_in_are_not_entered(source: QemuProcess) -> None:
    assert namespaces_to_enter(source) == ()
