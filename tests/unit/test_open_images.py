"""The files that a process has open, whatever their descriptors are: here of this process itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from sevhop_qmp.open_images import OpenFiles, file_identity
from sevhop_qmp.process import QemuProcess


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """One image."""
    path = tmp_path / "image"
    path.write_bytes(b"disk")
    return path


@pytest.fixture
def files(image: Path) -> Iterator[tuple[OpenFiles, int, int]]:
    """The files that we have open, the image's descriptor, and one of a pipe."""
    disk, pipe = os.open(image, os.O_RDONLY), os.pipe()
    process = QemuProcess.open(os.getpid())
    with OpenFiles(process) as found:
        yield found, disk, pipe[0]
    process.close()
    for fd in (disk, *pipe):
        os.close(fd)


def open_at(number: int, path: Path) -> None:
    """Open a file with that descriptor."""
    fd = os.open(path, os.O_RDONLY)
    os.dup2(fd, number)
    os.close(fd)


@pytest.mark.parametrize("quick", [False, True])
def test_image_reopened_with_another_descriptor_is_no_change(
    quick: bool, files: tuple[OpenFiles, int, int], image: Path
) -> None:
    """As QEMU does with an image that it gives up, when a client has hung up meanwhile."""
    found, disk, other = files
    open_at(other, image)
    os.close(disk)
    try:
        assert found.changed(quick=quick) == set()
    finally:
        os.dup2(other, disk)


def test_other_image_with_a_reused_descriptor_is_a_change(files: tuple[OpenFiles, int, int], tmp_path: Path) -> None:
    found, _, other = files
    overlay = tmp_path / "overlay"
    overlay.touch()
    open_at(other, overlay)
    assert found.changed() == {file_identity(overlay.stat())}


@pytest.mark.parametrize("quick", [False, True])
def test_closed_image_is_a_change(quick: bool, files: tuple[OpenFiles, int, int], image: Path) -> None:
    found, disk, other = files
    os.dup2(other, disk)
    assert found.changed(quick=quick) == {file_identity(image.stat())}


def test_image_opened_for_writing_is_writable(files: tuple[OpenFiles, int, int], image: Path) -> None:
    found, _, _ = files
    identity = file_identity(image.stat())
    assert identity is not None
    assert not found.writable(identity)
    with image.open("r+b"):
        assert found.writable(identity)
    assert not found.writable(identity)
