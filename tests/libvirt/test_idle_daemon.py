"""virtqemud as its units have it: started by its socket, and ended when it has neither clients nor running domains."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.guests.daemon import Daemon
from tests.support.guests.running import wait_until

from .conftest import StartDomain

pytestmark = pytest.mark.virtqemud
_SOCKET = Path("/run/libvirt/virtqemud-sock")
#: As systemd does it, and by a program of that name: the daemon is left out where processes are counted.
_ACTIVATED = """#!/bin/sh
exec {directory}/activate/virtqemud --listen {socket} --fdname virtqemud.socket {daemon} --timeout 2
"""


@pytest.fixture
def daemon(libvirt_of_ones_own: None, modular: Path | None, tmp_path: Path) -> Iterator[Daemon]:
    """It exits within seconds; its socket is listened on again at once."""
    activate = shutil.which("systemd-socket-activate")
    if modular is None or activate is None:
        pytest.skip("needs --virtqemud, and systemd-socket-activate")
    for program in modular.iterdir():
        (tmp_path / program.name).symlink_to(program)
    (tmp_path / "activate").mkdir()
    (tmp_path / "activate/virtqemud").symlink_to(activate)
    script = tmp_path / "virtqemud"
    script.unlink()
    script.write_text(_ACTIVATED.format(directory=tmp_path, socket=_SOCKET, daemon=modular / "virtqemud"))
    script.chmod(0o755)
    with Daemon.installed(modular=tmp_path) as daemon:
        yield daemon
        assert daemon.sevhop("uninstall").returncode == 0


def is_idle(daemon: Daemon) -> bool:
    """Whether it has exited, and the next client would start it."""
    if (daemon.root / "run/virtqemud.pid").exists():
        return False
    rows = Path(f"/proc/{daemon.pid}/net/unix").read_text().splitlines()
    # Num RefCount Protocol Flags Type St Inode Path; the flag is that of a listening socket
    return any(row.endswith(f" {_SOCKET}") and row.split()[3] == "00010000" for row in rows)


def test_upgrade_is_completed_by_a_daemon_that_was_not_there_meanwhile(
    daemon: Daemon, start: StartDomain, new: Path
) -> None:
    """While the guest runs in the transit, libvirt has no running domain."""
    guest = start()
    guest.wait_for_ticks()
    report = daemon.upgrade(guest.name, "--emulator", new, "--prepare")
    assert report["outcome"] == "prepared"
    wait_until(lambda: is_idle(daemon), 60, "the daemon exits")
    guest.wait_for_ticks()
    assert "the guest runs in the transit" in daemon.sevhop("status").stdout
    wait_until(lambda: is_idle(daemon), 60, "the daemon exits again")
    daemon.virsh("restore", report["image"])
    guest.wait_for_ticks()
    assert daemon.sevhop("recover").returncode == 0
    assert (guest.state, guest.emulator()) == ("running", str(new))
    assert "PASS libvirt: virtqemud" in daemon.sevhop("check", guest.name).stdout
