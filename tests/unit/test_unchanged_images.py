"""The images of a guest that is suspended in the keeper: whether somebody has changed one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from sevhop.disks import unchanged_images
from sevhop.disks.block_graph import BlockGraph, Disk, Node


def node(name: str, driver: str, filename: str, **children: str) -> Node:
    """One of a graph."""
    return Node(name, driver, filename, False, False, False, "off", 1, 1, True, (), children)


def written(image: Path) -> None:
    image.write_bytes(b"y" * 512)


def grown(image: Path) -> None:
    with image.open("ab") as file:
        file.write(b"y")


def replaced(image: Path) -> None:
    other = image.with_name("other")
    other.write_bytes(image.read_bytes())
    os.utime(other, ns=(0, image.stat().st_mtime_ns))
    other.rename(image)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """One that was written to long ago."""
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 512)
    os.utime(path, ns=(0, 0))
    return path


def of(image: Path) -> dict[str, object]:
    """As a journal has it."""
    found: dict[str, object] = json.loads(json.dumps(unchanged_images.recorded([image])))
    return found


def test_image_that_nobody_has_touched_is_unchanged(image: Path) -> None:
    before = of(image)
    image.read_bytes()
    image.chmod(0o600)  # libvirt changes owner and mode when a QEMU exits
    assert unchanged_images.changed(before) == ""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (written, "it was written to"),
        (grown, "its size has changed, and it was written to"),
        (replaced, "it is another file"),
    ],
)
def test_change_of_an_image_is_named(image: Path, change: Callable[[Path], None], reason: str) -> None:
    before = of(image)
    change(image)
    assert unchanged_images.changed(before) == f"{image}: {reason}"


def test_image_that_is_gone_is_changed(image: Path) -> None:
    before = of(image)
    image.unlink()
    assert unchanged_images.changed(before) == f"{image}: No such file or directory"


def test_images_that_a_qemu_of_the_hop_has_had_must_be_the_same_files(image: Path) -> None:
    before = of(image)
    grown(image)
    assert unchanged_images.changed(before, opened=True) == ""
    replaced(image)
    assert "another file" in unchanged_images.changed(before, opened=True)


def test_what_is_no_file_is_not_compared() -> None:
    """The unit of the timer does not see devices."""
    assert unchanged_images.recorded(["/dev/null", "/missing"]) == {}


def test_images_are_those_in_use_with_their_backing_images_but_no_shared_one() -> None:
    graph = BlockGraph(
        {"vda": Disk("", "vda", "top"), "vdb": Disk("", "vdb", "shared"), "vdc": Disk("", "vdc", "remote")},
        {
            "top": node("top", "qcow2", "/a.qcow2", file="file", backing="base"),
            "file": node("file", "file", "/a.qcow2"),
            "base": node("base", "file", "/base.raw"),
            "shared": node("shared", "file", "/cluster"),
            "remote": node("remote", "nbd", "nbd://host"),
            "spare": node("spare", "file", "/spare"),
        },
        (),
    )
    xml = "<domain><devices><disk><source file='/cluster'/><shareable/></disk></devices></domain>"
    assert unchanged_images.paths(graph, xml) == ["/a.qcow2", "/base.raw"]
