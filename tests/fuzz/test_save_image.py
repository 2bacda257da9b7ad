"""The save image: what was written is read, and nothing else."""

from __future__ import annotations

import contextlib
import tempfile
from typing import BinaryIO, cast

import pytest
from hypothesis import strategies as st
from sevhop.libvirt.save_image import SaveImage, SaveImageError

from .inputs import fuzzed, raw, texts


def file_with(content: bytes) -> BinaryIO:
    """An open file."""
    file = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 - the caller closes it
    file.write(content)
    file.seek(0)
    return file


def written(image: SaveImage) -> bytes:
    """As it lies on disk."""
    with file_with(b"") as file:
        image.write(file)
        file.seek(0)
        return file.read()


@fuzzed(xml=texts, running=st.booleans(), stream=raw, piped=st.booleans())
def test_read_returns_what_was_written(xml: str, running: bool, stream: bytes, piped: bool) -> None:
    image = SaveImage(xml, running, stream, piped)
    try:
        content = written(image)
    except SaveImageError:
        return
    with file_with(content) as file:
        assert SaveImage.read(file) == image


XML = "<domain><name>gäst</name></domain>"
WHOLE = [written(SaveImage(XML, True, b"QEVM\0\0\0\3state", piped)) for piped in (False, True)]


@fuzzed(
    content=st.one_of(
        raw,
        st.tuples(st.sampled_from(WHOLE), st.integers(0, len(WHOLE[1])), raw, st.integers(0, 40)).map(
            lambda cut: cut[0][: cut[1]] + cut[2] + cut[0][cut[1] + cut[3] :]
        ),
        st.tuples(st.sampled_from(WHOLE), st.integers(16, 35), st.binary(min_size=1, max_size=4)).map(
            lambda field: field[0][: field[1]] + field[2] + field[0][field[1] + len(field[2]) :]
        ),
    )
)
def test_read_refuses_damage_in_one_way(content: bytes) -> None:
    with file_with(content) as file, contextlib.suppress(SaveImageError):
        SaveImage.read(file)


def test_write_refuses_xml_that_is_not_unicode() -> None:
    with pytest.raises(SaveImageError, match="UTF-8"):
        written(SaveImage("<domain>\udcff</domain>", True, b""))
