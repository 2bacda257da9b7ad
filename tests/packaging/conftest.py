"""
The packages are built once, and Debian's is installed in clean Debian releases (:mod:`tests.support.guests.release`),
each with a libvirt daemon and a QEMU of its own.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.guests import counter
from tests.support.guests.build import ROOT, Unavailable
from tests.support.guests.daemon import Daemon, Description, DomainGuest
from tests.support.guests.enclosure import GUESTS
from tests.support.guests.machine import Accelerator
from tests.support.guests.release import Release

#: Where the package is in a release; the name does not show whose it is.
PACKAGE = Path("/root/package.deb")
#: A host as the package finds it: with libvirt and QEMU, and without Python.
HOST = (
    *("libvirt-daemon-system", "libvirt-clients", "qemu-system-x86", "qemu-utils", "seabios", "ipxe-qemu"),
    *("bash-completion", "zsh", "fish", "gcc", "libc6-dev"),
)
#: What the package depends on, and what makes virtual environments.
DOWNLOADED = ("python3-libvirt", "python3-tenacity", VENV := "python3-venv")
#: As libvirt takes it, and as no shell may.
NAME = "guest-$(touch pwned);a b*"


def left(release: Release) -> list[str]:
    """Whatever is called sevhop, or speaks of it where programs are configured."""
    files = release.must("find", "/", "-xdev", "-iname", "*sevhop*").splitlines()
    return files + release.run("grep", "--recursive", "--files-with-matches", "sevhop", "/etc").stdout.splitlines()


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``tools/package --rpm`` leaves in its directory."""
    directory = tmp_path_factory.mktemp("package")
    done = subprocess.run([ROOT / "tools/package", "--rpm", directory], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture(scope="session")
def package(built: Path) -> Path:
    """The package."""
    (path,) = built.glob("sevhop_*.deb")
    return path


@pytest.fixture(scope="session", params=["bookworm", "trixie"])
def clean(request: pytest.FixtureRequest) -> Iterator[Release]:
    """A newly installed Debian 12, and a Debian 13."""
    try:
        release = Release.start(request.param, HOST, DOWNLOADED)
    except Unavailable as err:
        pytest.skip(f"no Debian {request.param}: {err}")
    try:
        yield release
    finally:
        release.stop()


@pytest.fixture(scope="session")
def host(clean: Release, package: Path) -> Release:
    """With the package, which brings what it needs."""
    shutil.copyfile(package, clean.root / PACKAGE.relative_to("/"))
    clean.install(PACKAGE)
    return clean


@pytest.fixture(scope="session")
def daemon(host: Release) -> Iterator[Daemon]:
    """libvirt of that release, and ``sevhop install``."""
    with Daemon.installed(inside=host) as daemon:
        yield daemon


@pytest.fixture
def guest(daemon: Daemon, accelerator: Accelerator) -> Iterator[DomainGuest]:
    """A domain of libvirt, started in the QEMU of that release."""
    firmware = GUESTS / "counter.bin"
    shutil.copyfile(counter.firmware(idle=True), daemon.root / firmware.relative_to("/"))
    emulator = Path("/usr/bin/qemu-system-x86_64")
    guest = DomainGuest.start(daemon, Description(NAME, emulator, accelerator, firmware=firmware))
    try:
        yield guest
    finally:
        guest.end()
        for path in (daemon.root / GUESTS.relative_to("/")).iterdir():
            path.unlink()  # the next one is of the same name
    assert daemon.left_over() == []
