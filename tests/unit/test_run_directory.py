"""What is left in the directory of a hop for others to find."""

from __future__ import annotations

from pathlib import Path

import pytest
from sevhop.libvirt.hook import TRANSIT
from sevhop.records import run_directory


def test_transit_that_cannot_be_noted_is_an_error_with_a_hint(tmp_path: Path) -> None:
    """A full /run is nobody's bug."""
    run_directory.note_transit(tmp_path, "4711 12")
    assert (tmp_path / TRANSIT).read_text() == "4711 12"
    with pytest.raises(run_directory.RunDirectoryError, match="No such file or directory") as failed:
        run_directory.note_transit(tmp_path / "missing", "4711 12")
    assert failed.value.hint == "free space in /run, then try again"
