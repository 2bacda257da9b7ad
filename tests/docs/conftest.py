"""
A host on which the commands of the documentation are run: a private libvirt daemon, and two QEMUs, of which the newer
one is installed when a page upgrades the package.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.guests.daemon import Daemon
from tests.support.guests.enclosure import PROGRAMS
from tests.support.guests.machine import Accelerator
from tests.support.guests.running import wait_until

from .console import Shell
from .pages import Block

#: The path of QEMU in the pages, and its replacement here: a symbolic link to one of the two QEMUs.
_EMULATOR = "/usr/bin/qemu-system-x86_64"
_LINK = PROGRAMS / "qemu-system-x86_64"
#: The working directory at the beginning of a page.
_HOME = "/run/home"


class Host:
    """
    A host with one daemon, at the beginning of a page: no domain is defined, sevhop is not installed.

    :ivar shell: of root.
    """

    def __init__(self, daemon: Daemon, shell: Shell, accelerator: Accelerator) -> None:
        self.daemon = daemon
        self.shell = shell
        self._accelerator = accelerator

    def write(self, block: Block) -> None:
        """Write a block that has a name to a file of that name."""
        text = self.shell.here(block.text)
        if self._accelerator == "tcg":
            text = text.replace("type='kvm'", "type='qemu'")
        (self.daemon.root / _HOME.lstrip("/") / block.file).write_text(text)

    def install(self, emulator: Path) -> None:
        """Replace QEMU, as an update of its package does."""
        done = self.daemon.run("ln", "--symbolic", "--force", "--no-dereference", emulator, _LINK)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def daemon(libvirt_of_ones_own: None) -> Iterator[Daemon]:
    """A daemon without sevhop's hook."""
    daemon = Daemon.start()
    try:
        yield daemon
    finally:
        daemon.stop()


@pytest.fixture
def host(daemon: Daemon, old: Path, accelerator: Accelerator) -> Iterator[Host]:
    """A host; whatever a page has created is removed afterwards."""
    before = set(daemon.processes())
    done = daemon.run("mkdir", "-p", _HOME, "/run/vm", "/var/lib/libvirt/images")
    assert done.returncode == 0, done.stderr
    path = f"{PROGRAMS}:{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    entered = ["nsenter", "--mount", "--net", "--target", str(daemon.pid), "--"]
    shell = Shell(entered, {"PATH": path, "HOME": _HOME, "LC_ALL": "C.UTF-8"}, _HOME, {_EMULATOR: str(_LINK)})
    host = Host(daemon, shell, accelerator)
    try:
        with shell:
            host.install(old)
            yield host
    finally:
        for name in daemon.virsh("list", "--all", "--name").split():
            daemon.run("virsh", "destroy", name)
            daemon.run("virsh", "undefine", name)
        daemon.sevhop("uninstall")
        for pid in set(daemon.processes()) - before:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: set(daemon.processes()) <= before, 30, "the last processes end")
    assert daemon.left_over() == []
