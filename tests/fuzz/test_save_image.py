"""The save image: what was written is read, and nothing else."""

from __future__ import annotations

import contextlib
import tempfile
from typing import BinaryIO, cast

import pytest
from hypothesis import strategies as st
from sevhop.save_image import SaveImage, SaveImageError

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


@fuzzed(xml=texts, running=st.booleans(), stream=raw)
def test_what_was_written_is_read(xml: str, running: bool, stream: bytes) -> None:
    image = SaveImage(xml, running, stream)
    try:
        content = written(image)
    except SaveImageError:
        return
    with file_with(content) as file:
        assert SaveImage.read(file) == image


WHOLE = written(SaveImage("<domain><name>gäst</name></domain>", True, b"QEVM\0\0\0\3state"))


@fuzzed(
    content=st.one_of(
        raw,
        st.tuples(st.integers(0, len(WHOLE)), raw, st.integers(0, 40)).map(
            lambda cut: WHOLE[: cut[0]] + cut[1] + WHOLE[cut[0] + cut[2] :]
        ),
        st.tuples(st.integers(16, 35), st.binary(min_size=1, max_size=4)).map(
            lambda field: WHOLE[: field[0]] + field[1] + WHOLE[field[0] + len(field[1]) :]
        ),
    )
)
def test_damage_is_refused_in_one_way(content: bytes) -> None:
    with file_with(content) as file, contextlib.suppress(SaveImageError):
        SaveImage.read(file)


def test_xml_that_is_not_unicode_is_not_written() -> None:
    with pytest.raises(SaveImageError, match="UTF-8"):
        written(SaveImage("<domain>\udcff</domain>", True, b""))
