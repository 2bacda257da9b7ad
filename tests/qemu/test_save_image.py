"""The save image of libvirt, whose place a pipe of the keeper takes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import pytest
from sevhop_qmp import device_state

from tests.support.guests.machine import Q35, Accelerator
from tests.support.guests.running import wait_until

from .adopting import EVERY_EMULATOR, TIMEOUT, Destination, Keeper, Memory, machine, refused, unread

CONTENT = b"LibvirtQemudSave, and XML"


class Stream(NamedTuple):
    """A save image without a stream, and a pipe for it."""

    image: FileIO
    reader: FileIO
    writer: FileIO

    @property
    def reply(self) -> tuple[int, int]:
        return self.reader.fileno(), self.image.fileno()


@contextmanager
def saved(path: Path) -> Iterator[Stream]:
    path.write_bytes(CONTENT)
    read_end, write_end = os.pipe()
    with FileIO(path) as image, FileIO(read_end) as reader, FileIO(write_end, "wb") as writer:
        image.seek(len(CONTENT))
        yield Stream(image, reader, writer)


@pytest.fixture
def stream(tmp_path: Path) -> Iterator[Stream]:
    with saved(tmp_path / "image") as stream:
        yield stream


def link(destination: Destination, fd: int) -> str:
    return os.readlink(f"/proc/{destination.pid}/fd/{fd}")


@EVERY_EMULATOR
def test_stream_comes_from_the_keepers_pipe(
    qemu: Path, accelerator: Accelerator, memory: Memory, stream: Stream
) -> None:
    """... at the number at which libvirt has passed the file, with the URI that libvirt uses."""
    number = stream.image.fileno()
    head = device_state.header(Q35)
    with (
        Keeper([memory], stream=stream.reply) as keeper,
        Destination.adopting(qemu, machine(accelerator), keeper, keep=[number]) as destination,
    ):
        assert link(destination, number) == os.readlink(f"/proc/self/fd/{stream.reader.fileno()}")
        destination.execute("migrate-incoming", {"uri": f"fd:{number}"})
        destination.adopt_ram_with(stream.reader.fileno(), len(head))
        stream.writer.write(head)
        wait_until(lambda: unread(stream.reader.fileno()) == 0, TIMEOUT, "the header is read")
        assert destination.status().ram == "private"
        stream.writer.write(b"\4")
        wait_until(lambda: destination.status().ram == "shared", TIMEOUT, "the memory is mapped")
    assert stream.image.tell() == len(CONTENT), "QEMU has read the file"


def test_every_descriptor_of_the_save_image_is_replaced(
    qemu: Path, accelerator: Accelerator, memory: Memory, stream: Stream, tmp_path: Path
) -> None:
    with open(stream.image.name, "rb") as again, open(tmp_path / "other", "wb") as other:
        keep = [stream.image.fileno(), again.fileno(), other.fileno()]
        with (
            Keeper([memory], stream=stream.reply) as keeper,
            Destination.adopting(qemu, machine(accelerator), keeper, keep=keep) as destination,
        ):
            links = [link(destination, number) for number in keep]
            assert links[0] == links[1] == os.readlink(f"/proc/self/fd/{stream.reader.fileno()}")
            assert links[2] == other.name
            assert keeper.requests.count("stream") == 1


@pytest.mark.parametrize("reply", [b"none", b"error invalid request"])
def test_save_image_stays_if_the_keeper_has_no_stream(
    qemu: Path, accelerator: Accelerator, memory: Memory, stream: Stream, reply: bytes
) -> None:
    keep = [stream.image.fileno()]
    with (
        Keeper([memory], override=lambda request: reply if request == "stream" else None) as keeper,
        Destination.adopting(qemu, machine(accelerator), keeper, keep=keep) as destination,
    ):
        assert link(destination, keep[0]) == str(stream.image.name)


def test_save_image_has_the_stream_of_a_source_that_has_ended(
    qemu: Path, accelerator: Accelerator, memory: Memory, stream: Stream
) -> None:
    """The guest waits, so the keeper is not asked."""
    keep = [stream.image.fileno()]
    with (
        Keeper([memory], source="ended", stream=stream.reply) as keeper,
        Destination.adopting(qemu, machine(accelerator), keeper, keep=keep) as destination,
    ):
        assert link(destination, keep[0]) == str(stream.image.name)
        assert "stream" not in keeper.requests


def test_destination_is_refused_without_the_save_image(
    qemu: Path, accelerator: Accelerator, memory: Memory, stream: Stream
) -> None:
    """A QEMU that reads its state from elsewhere would not wait for the guest's."""
    with Keeper([memory], stream=stream.reply) as keeper:
        line = refused(qemu, machine(accelerator), keeper)
    file = os.fstat(stream.image.fileno())
    assert line == f"the save image is not open in this QEMU: device {file.st_dev}, inode {file.st_ino}"


def test_stream_that_is_no_pipe_is_refused(
    qemu: Path, accelerator: Accelerator, memory: Memory, stream: Stream
) -> None:
    number = stream.image.fileno()
    with Keeper([memory], stream=(number, number)) as keeper:
        line = refused(qemu, machine(accelerator), keeper, keep=[number])
    assert line == "invalid reply of the keeper: the descriptor of the stream is not a pipe"


@pytest.mark.parametrize("reply", ["fd", "fd 1", "fd 1 x", "fd 1 2 3", "ok 1 2", ""])
def test_invalid_reply_about_the_stream_is_refused(
    qemu: Path, accelerator: Accelerator, memory: Memory, reply: str
) -> None:
    with Keeper([memory], override=lambda request: reply.encode() if request == "stream" else None) as keeper:
        line = refused(qemu, machine(accelerator), keeper)
    if reply:
        assert line == f"invalid reply of the keeper about the stream: {reply}"
    else:
        assert line == "the keeper does not answer: Connection reset by peer"
