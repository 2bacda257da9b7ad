"""The package as it lies there."""

from __future__ import annotations

import configparser
import re
import subprocess
from pathlib import Path

import pytest
from sevhop.install import units

from tests.support.guests.build import ROOT


@pytest.fixture(scope="session")
def unpacked(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its files."""
    directory = tmp_path_factory.mktemp("unpacked")
    subprocess.run(["dpkg-deb", "--extract", package, directory], check=True)
    return directory


def said(*command: str | Path) -> str:
    """What a command prints, on both its streams."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.stdout


def test_lintian_has_nothing_to_say(built: Path) -> None:
    (changes,) = built.glob("*.changes")
    assert said("lintian", "--allow-root", "--display-info", "--fail-on", "none", changes) == ""


def test_version_is_that_of_the_project(package: Path) -> None:
    project = configparser.ConfigParser()
    project.read(ROOT / "setup.cfg")
    version = said("dpkg-deb", "--field", package, "Version").strip()
    assert version.rpartition("-")[0] == project["metadata"]["version"]


@pytest.mark.parametrize("page", ["man1/sevhop.1", "man7/sevhop-hook.7"])
def test_manual_pages_are_without_fault(unpacked: Path, tmp_path: Path, page: str) -> None:
    path = tmp_path / Path(page).name
    path.write_text(said("zcat", unpacked / f"usr/share/man/{page}.gz"))
    assert said("mandoc", "-T", "lint", "-W", "warning", path) == ""
    done = subprocess.run(["man", "--warnings", "--local-file", path], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_manual_has_every_command(unpacked: Path) -> None:
    text = said("man", "--local-file", unpacked / "usr/share/man/man1/sevhop.1.gz")
    words = " ".join(text.split())
    for command in ("hop", "upgrade", "check", "status", "recover", "install", "uninstall"):
        assert f"usage: sevhop {command} " in words
    for section in ("EXIT STATUS", "FILES", "EXAMPLES", "SEE ALSO"):
        assert f"\n{section}\n" in text


def test_units_run_what_is_installed(unpacked: Path) -> None:
    """All that `sevhop install` would put in place otherwise are there; those that upgrade are not enabled."""
    texts = {name: next(unpacked.glob(f"**/systemd/system/{name}")).read_text() for name in units.NAMES}
    commands = [line for text in texts.values() for line in text.splitlines() if line.startswith("ExecStart=")]
    assert commands == [
        "ExecStart=/usr/bin/sevhop recover --unattended --timeout 30",
        "ExecStart=/usr/bin/sevhop upgrade --outdated --keep-going $SEVHOP_UPGRADE_OPTIONS",
    ]


def test_units_that_upgrade_are_not_enabled(package: Path) -> None:
    script = said("dpkg-deb", "--info", package, "postinst")
    assert re.search("deb-systemd-invoke .*sevhop-recover.path", script)
    assert not re.search("deb-systemd-invoke .*sevhop-upgrade", script)
    # What debhelper writes for a unit that is only enabled again if the administrator had enabled it.
    assert "deb-systemd-helper debian-installed 'sevhop-upgrade.path'" in script
    assert "deb-systemd-helper debian-installed 'sevhop-recover.path'" not in script


def test_package_is_for_any_python_of_debian(package: Path) -> None:
    depends = said("dpkg-deb", "--field", package, "Depends")
    assert "python3:any" in depends
    assert "python3.1" not in depends


def test_package_puts_nothing_in_debians_python_path(unpacked: Path) -> None:
    assert list(unpacked.glob("usr/lib/python3*")) == []
    assert (unpacked / "usr/lib/sevhop/qemu/qmp/qmp_client.py").exists()
