"""libvirt's save image: written, read again, and refused where it is damaged."""

from __future__ import annotations

import dataclasses
import gzip
import os
import struct
import subprocess
from pathlib import Path

import pytest
from sevhop.libvirt.save_image import SaveImage, SaveImageError

XML = "<domain type='kvm'><name>gäst</name></domain>"
IMAGE = SaveImage(XML, True, b"QEVM\0\0\0\3state")
HEADER = 92
FIELDS = {"version": 16, "xml": 20, "running": 24, "compression": 28, "cookie": 32}


def written(path: Path, image: SaveImage = IMAGE) -> bytes:
    with path.open("wb") as file:
        image.write(file)
    return path.read_bytes()


def read(path: Path, content: bytes) -> SaveImage:
    path.write_bytes(content)
    with path.open("rb") as file:
        return SaveImage.read(file)


def test_save_image_layout_is_that_of_libvirt(tmp_path: Path) -> None:
    content = written(tmp_path / "image")
    magic, version, length, running, compression, cookie = struct.unpack("=16s5I", content[:36])
    assert (magic, version, running, compression, cookie) == (b"LibvirtQemudSave", 2, 1, 0, 0)
    assert content[36:HEADER] == bytes(56)
    assert content[HEADER : HEADER + length].rstrip(b"\0") == XML.encode()
    assert content[HEADER + length :] == IMAGE.stream


@pytest.mark.parametrize("piped", [True, False])
@pytest.mark.parametrize("running", [True, False])
def test_read_returns_what_was_written(tmp_path: Path, running: bool, piped: bool) -> None:
    image = SaveImage(XML, running, b"\0\1\2" * 100_000, piped)
    assert read(tmp_path / "copy", written(tmp_path / "image", image)) == image


def test_stream_for_a_pipe_is_unpacked_by_gzip(tmp_path: Path) -> None:
    image = dataclasses.replace(IMAGE, piped=True, stream=os.urandom(200_000))
    content = written(tmp_path / "image", image)
    length, _, compression = struct.unpack("=3I", content[20:32])
    assert compression == 1
    packed = content[HEADER + length :]
    done = subprocess.run(["gzip", "-dc"], input=packed, capture_output=True, check=True)
    assert done.stdout == image.stream


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"QEVM\0\0\0\3state",
        gzip.compress(b"state")[:-1],
        gzip.compress(b"state") + b"more",
        gzip.compress(bytes(10_000_000)),
    ],
    ids=["empty", "not packed", "cut", "trailing data", "bomb"],
)
def test_read_refuses_a_damaged_gzip_stream(tmp_path: Path, packed: bytes) -> None:
    content = bytearray(written(tmp_path / "image", SaveImage(XML, True, b"")))
    struct.pack_into("=I", content, FIELDS["compression"], 1)
    with pytest.raises(SaveImageError, match="damaged"):
        read(tmp_path / "copy", bytes(content) + packed)


def test_write_refuses_xml_with_a_nul(tmp_path: Path) -> None:
    with pytest.raises(SaveImageError, match="NUL"):
        written(tmp_path / "image", SaveImage("<a>\0</a>", True, b""))


@pytest.mark.parametrize("length", [0, 1, 16, 91, HEADER, HEADER + 10])
def test_read_refuses_a_truncated_file(tmp_path: Path, length: int) -> None:
    with pytest.raises(SaveImageError, match=r"too short|does not have"):
        read(tmp_path / "image", written(tmp_path / "image")[:length])


@pytest.mark.parametrize(
    ("magic", "reason"),
    [(b"LibvirtQemudPart", "incomplete"), (b"LibvirtQemudSavE", "not a save image"), (bytes(16), "not a save image")],
)
def test_read_refuses_another_magic(tmp_path: Path, magic: bytes, reason: str) -> None:
    with pytest.raises(SaveImageError, match=reason):
        read(tmp_path / "image", magic + written(tmp_path / "image")[16:])


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("version", 1, "version 1"),
        ("version", 0x02000000, "version 33554432"),
        ("xml", 0xFFFFFFFF, "does not have"),
        ("xml", 1 << 20, "does not have"),
        ("xml", 5, "no end"),
        ("xml", 0, "no end"),
        ("compression", 1, "damaged"),
        ("compression", 2, "compressed"),
        ("cookie", 0x7FFFFFFF, "cookie"),
    ],
)
def test_read_refuses_hostile_fields(tmp_path: Path, field: str, value: int, reason: str) -> None:
    content = bytearray(written(tmp_path / "image"))
    struct.pack_into("=I", content, FIELDS[field], value)
    with pytest.raises(SaveImageError, match=reason):
        read(tmp_path / "image", bytes(content))


def test_read_refuses_a_sparse_giant(tmp_path: Path) -> None:
    path = tmp_path / "image"
    written(path)
    with path.open("r+b") as file:
        file.truncate(1 << 40)
        file.seek(0)
        with pytest.raises(SaveImageError, match="contains RAM"):
            SaveImage.read(file)


def test_read_refuses_xml_that_is_not_utf8(tmp_path: Path) -> None:
    content = written(tmp_path / "image").replace("ä".encode(), b"\xff\xfe")
    with pytest.raises(SaveImageError, match="UTF-8"):
        read(tmp_path / "image", content)
