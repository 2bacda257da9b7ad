"""What cannot be written is reported with what to do about it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from sevhop.install import atomic_file
from sevhop_qmp.errors import SevhopError


@pytest.mark.parametrize(
    ("number", "hint"), [(errno.EACCES, "run sevhop as root"), (errno.ENOSPC, "free space"), (errno.EROFS, "see what")]
)
def test_reason_decides_about_the_hint(number: int, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    monkeypatch.setattr(os, "rename", fail)
    monkeypatch.setattr(os, "replace", fail)
    path = tmp_path / "file"
    with pytest.raises(SevhopError, match=os.strerror(number)) as caught:
        atomic_file.write(path, b"text", 0o644)
    assert hint in caught.value.hint
    assert list(tmp_path.iterdir()) == []
