"""
The RPM package: what is in it, compared with the Debian package, and what its scripts do.

There is no Fedora or RHEL to install it on. rpm installs it into a Debian release instead, without dependencies: their
names are not Debian's.
"""

from __future__ import annotations

import configparser
import platform
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from sevhop.install import units

from tests.support.guests.build import ROOT, Unavailable
from tests.support.guests.release import Release

from .conftest import DOWNLOADED, HOST, left

#: What only one of the packages has: for its package manager, or as its distribution has it.
_OF_DEBIAN = re.compile(r"/usr/share/(doc/|lintian/|python3/runtime\.d/)")
_OF_RPM = re.compile(r"/usr/share/(doc|licenses)/|/usr/lib/\.build-id|/usr/lib/systemd/system-preset/|.*/__pycache__/")
_HOOK = Path("/etc/libvirt/hooks/qemu.d/sevhop")


@pytest.fixture(scope="session")
def rpm(built: Path) -> Path:
    """The package."""
    (path,) = built.glob("sevhop-*.x86_64.rpm")
    return path


def asked(rpm: Path, *options: str) -> list[str]:
    """What rpm prints of the package, in lines."""
    command: list[str | Path] = ["rpm", "--query", "--package", rpm, *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_version_is_that_of_the_project(rpm: Path) -> None:
    project = configparser.ConfigParser()
    project.read(ROOT / "setup.cfg")
    assert asked(rpm, "--queryformat", "%{VERSION}") == [project["metadata"]["version"]]


def test_files_and_modes_are_those_of_the_debian_package(rpm: Path, package: Path) -> None:
    listed = subprocess.run(["dpkg-deb", "--contents", package], capture_output=True, text=True, check=True).stdout
    # MODE OWNER SIZE DATE TIME ./PATH
    ours = [(words[0], words[5].removeprefix(".")) for words in map(str.split, listed.splitlines())]
    theirs = [(mode, path) for mode, path in (line.split() for line in asked(rpm, "--queryformat", _MODES))]
    assert comparable(theirs, _OF_RPM) == comparable(ours, _OF_DEBIAN)


_MODES = "[%{FILEMODES:perms} %{FILENAMES}\\n]"


def comparable(files: list[tuple[str, str]], without: re.Pattern[str]) -> list[tuple[str, str]]:
    """Files alone, where both have them; a library is executable in one of them, and pages are compressed."""
    found = []
    for mode, path in files:
        if mode.startswith("-") and not without.match(path):
            path = re.sub(r"^/lib/", "/usr/lib/", path)
            path = path.replace("/zsh/vendor-completions/", "/zsh/site-functions/").removesuffix(".gz")
            found.append(("" if path.endswith(".so") else mode, path))
    return sorted(found, key=lambda file: file[1])


def test_documentation_is_there(rpm: Path) -> None:
    names = {Path(path).name for path in asked(rpm, "--docfiles")}
    assert names >= {path.name for path in (ROOT / "docs").glob("*.md")} | {"README.md", "sevhop.1", "sevhop-hook.7"}


def test_requirements_are_those_of_the_project(rpm: Path) -> None:
    """And a C library that RHEL has since 9, if the package is built on Debian 12."""
    wanted = {line for line in asked(rpm, "--requires") if not re.match(r"rpmlib\(|libc\.so|rtld\(|/bin/sh", line)}
    assert wanted == {"python3 >= 3.11", "python3-libvirt >= 9.0", "python3-tenacity >= 8.2"}
    assert "libvirt-daemon-driver-qemu >= 9.0" in asked(rpm, "--recommends")
    provided = [line.split()[0] for line in asked(rpm, "--provides")]
    assert sorted(provided) == ["bundled(python3dist(qemu-qmp))", "sevhop", "sevhop(x86-64)"]


@pytest.fixture(scope="module")
def root() -> Iterator[Release]:
    """The Debian release that this machine has, which has built the package, with what the package requires."""
    suite = platform.freedesktop_os_release()["VERSION_CODENAME"]
    try:
        release = Release.start(suite, HOST, DOWNLOADED)
    except Unavailable as err:
        pytest.skip(f"no Debian {suite}: {err}")
    try:
        release.install("python3-libvirt", "python3-tenacity")
        yield release
    finally:
        release.stop()


def run_rpm(root: Release, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run rpm on that root; its scripts run in there."""
    command = ["rpm", "--root", root.root, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": "/usr/sbin:/usr/bin"})


@pytest.fixture
def installed(root: Release, rpm: Path) -> Iterator[Release]:
    """With the package."""
    done = run_rpm(root, "--install", "--nodeps", rpm)
    assert done.returncode == 0, done.stderr
    yield root
    run_rpm(root, "--erase", "sevhop")


def test_installed_command_runs_and_changes_no_file_of_the_package(installed: Release) -> None:
    """Modules are compiled: otherwise root's first command writes files that are not the package's, and stay."""
    assert installed.must("sevhop", "--version").startswith("sevhop ")
    assert installed.must("sevhop", "recover") == "no interrupted hop was found\n"
    verified = run_rpm(installed, "--verify", "--nodeps", "sevhop")
    assert (verified.returncode, verified.stdout) == (0, "")
    there = set(installed.must("find", "/usr/lib/sevhop").splitlines())
    assert there <= set(run_rpm(installed, "--query", "--list", "sevhop").stdout.splitlines())


def test_recover_units_alone_are_enabled(installed: Release) -> None:
    links = installed.must("find", "/etc/systemd/system", "-name", "sevhop*", "-printf", "%f\\n").splitlines()
    assert sorted(links) == sorted(units.RECOVER)


def test_removal_is_refused_only_while_a_hop_is_interrupted(installed: Release) -> None:
    journal = installed.root / "var/lib/sevhop/journal/1.journal"
    journal.parent.mkdir(parents=True)
    journal.touch()
    refused = run_rpm(installed, "--erase", "sevhop")
    assert refused.returncode != 0
    assert "/1.journal (see sevhop status, or run: sevhop recover)\n" in refused.stderr
    assert installed.must("sevhop", "--version")
    journal.unlink()
    done = run_rpm(installed, "--erase", "sevhop")
    assert done.returncode == 0, done.stderr
    assert left(installed) == []


def test_upgrade_of_the_package_renews_the_hook_and_removal_removes_it(installed: Release, rpm: Path) -> None:
    hook = installed.root / _HOOK.relative_to("/")
    hook.parent.mkdir(parents=True)
    hook.write_text("#!/bin/sh\nexec /usr/lib/sevhop/older\n")
    assert run_rpm(installed, "--upgrade", "--nodeps", "--force", rpm).returncode == 0
    assert "older" not in hook.read_text()
    assert run_rpm(installed, "--erase", "sevhop").returncode == 0
    assert left(installed) == []
