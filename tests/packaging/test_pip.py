"""``pip install`` of the source distribution in a virtual environment of a Debian release."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.guests.build import ROOT
from tests.support.guests.release import Release

from .conftest import VENV

_PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")


def test_source_distribution_is_installed_by_pip(host: Release, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns(".git", ".cache", ".venv", "*.so", "hook_client", "*.egg-info")
    shutil.copytree(ROOT, tree, ignore=ignored)
    wheels = tmp_path / "wheels"
    subprocess.run([sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", wheels], cwd=tree, check=True)
    # No network in there. All of them are for any Python.
    needed = ["setuptools >= 64", "wheel", "qemu.qmp >= 0.0.6", "tenacity >= 8.2"]
    subprocess.run([*_PIP, "download", "--only-binary", ":all:", "--dest", wheels, *needed], check=True)
    shutil.copytree(wheels, host.root / "root/wheels")
    host.install(VENV)
    host.must("python3", "-m", "venv", "/root/venv")
    host.must("/root/venv/bin/pip", "install", "--no-index", "--find-links", "/root/wheels", "sevhop")
    assert host.must("/root/venv/bin/sevhop", "--version") == host.must("sevhop", "--version")
    imports = "from sevhop.libvirt.hook_server import CLIENT; from sevhop_qmp import adopt_library"
    script = f"{imports}; print(adopt_library.path(), CLIENT)"
    library, client = host.must("/root/venv/bin/python3", "-c", script).split()
    assert library.startswith("/root/venv/")
    # It was compiled, and loads.
    host.must("env", f"LD_PRELOAD={library}", "/bin/true")
    assert host.run(client).returncode == 2
