"""Where adopt.so is."""

from __future__ import annotations

from pathlib import Path

import pytest
from sevhop_qmp import adopt_library
from sevhop_qmp.errors import SevhopError


def test_package_without_the_library_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adopt_library, "__file__", str(tmp_path / "adopt_library.py"))
    with pytest.raises(SevhopError, match=r"preload/adopt\.so is missing") as caught:
        adopt_library.path()
    assert caught.value.hint == "install the package with a C compiler present"


def test_link_to_the_library_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The editable installation has one."""
    (tmp_path / "preload").mkdir()
    (tmp_path / "built.so").touch()
    (tmp_path / "preload/adopt.so").symlink_to(tmp_path / "built.so")
    monkeypatch.setattr(adopt_library, "__file__", str(tmp_path / "adopt_library.py"))
    assert adopt_library.path() == (tmp_path / "built.so").resolve()
