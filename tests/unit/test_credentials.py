"""What a user may do with a file: decided in this process for our own user, and by test(1) for all others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from sevhop_qmp.credentials import Credentials

OURS = Credentials(os.geteuid(), os.getegid(), tuple(os.getgroups()), 0o022)
NOBODY = Credentials(65534, 65534, (), 0o022)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """One that belongs to us."""
    path = tmp_path / "file"
    path.touch(0o600)
    return path


def test_our_own_user(file: Path) -> None:
    assert OURS.may("rw", file)
    assert not OURS.may("x", file)
    file.chmod(0o700)
    assert OURS.may("rwx", file)
    assert not OURS.may("e", file.with_name("missing"))


@needs_root
def test_another_user() -> None:
    """Its directories count, too."""
    assert NOBODY.may("re", Path("/etc/passwd"))
    assert not NOBODY.may("w", Path("/etc/passwd"))
    assert not NOBODY.may("e", Path("/root/nothing"))


@needs_root
@pytest.mark.parametrize("mode", [0o000, 0o400, 0o111, 0o600, 0o755])
@pytest.mark.parametrize("access", ["r", "w", "x", "e", "rx"])
def test_both_ways_agree(file: Path, mode: int, access: str) -> None:
    """The same user in another group is asked about in the other way."""
    file.chmod(mode)
    other = Credentials(os.geteuid(), 65534, (), 0o022)
    assert OURS.may(access, file) == other.may(access, file)
