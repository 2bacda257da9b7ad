"""What ``tools/environment`` makes of a clone: at whatever path, for whatever user's settings."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.guests.build import ROOT

_MAKE = "source tools/environment; root=$PWD; make_environment; .venv/bin/sevhop --version"
_LIBRARY = "from sevhop_qmp import adopt_library; print(adopt_library.path())"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of this tree with its environment, which is of no use there; only root can look into it."""
    clone = tmp_path / "a b é" / "sevhop"
    ignored = shutil.ignore_patterns(".git", ".mypy_cache", ".ruff_cache", "build", "ansible*")
    shutil.copytree(ROOT, clone, symlinks=True, ignore=ignored)
    clone.chmod(0o700)
    return clone


def test_copied_clone_gets_an_environment_of_its_own(clone: Path, tmp_path: Path) -> None:
    configuration = tmp_path / "home" / ".config" / "pip" / "pip.conf"
    configuration.parent.mkdir(parents=True)
    configuration.write_text("[install]\nuser = yes\n[global]\nrequire-virtualenv = yes\n")
    done = subprocess.run(
        ["bash", "-euc", f"umask 077; {_MAKE}"],
        cwd=clone,
        env=os.environ | {"HOME": str(tmp_path / "home"), "LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("sevhop ")
    # Python starts there, with the packages there.
    done = subprocess.run([clone / ".venv/bin/python3", "-c", _LIBRARY], capture_output=True, text=True, check=True)
    library = Path(done.stdout.removesuffix("\n"))
    assert (clone / "qmp_ext/sevhop_qmp/preload/adopt.so").resolve() == library
    # QEMU's user can read what it has to preload.
    subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "cat", library],
        check=True,
        stdout=subprocess.DEVNULL,
    )
