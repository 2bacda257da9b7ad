"""Names that libvirt allows and a shell would not take for a name."""

from __future__ import annotations

from pathlib import Path

from tests.support.guests.daemon import Daemon

from .conftest import StartDomain


def test_upgrade_takes_metacharacters_in_names_literally(daemon: Daemon, start: StartDomain, new: Path) -> None:
    name = "a b;$(touch sevhop-x)`touch sevhop-y`\\*|#"
    guest = start(name=name)
    guest.wait_for_ticks()
    report = daemon.upgrade(name, "--emulator", new)
    assert report["outcome"] == "done", report
    assert guest.emulator() == str(new)
    guest.wait_for_ticks()
    done = daemon.run("find", "/run", "/var/lib/libvirt", "/root", "/tmp", "-maxdepth", "2", "-name", "sevhop-[xy]")
    assert done.stdout == ""
