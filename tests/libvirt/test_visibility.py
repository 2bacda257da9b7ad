"""Whoever asks about a guest that is not where libvirt has it gets to know that, and what to do."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.guests.daemon import Daemon

from .conftest import StartDomain

pytestmark = pytest.mark.libvirt

AS_NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--")


def test_prepared_guest_is_seen_by_every_command(daemon: Daemon, start: StartDomain, new: Path) -> None:
    guest = start()
    guest.wait_for_ticks()
    report = daemon.upgrade(guest.name, "--emulator", new, "--prepare")
    assert report["outcome"] == "prepared", report
    done = daemon.sevhop("check", guest.name)
    assert done.returncode == 1
    assert f"sevhop recover {guest.name}" in done.stderr
    assert "start it" not in done.stderr
    assert "sevhop recover" in json.loads(daemon.sevhop("check", guest.name, "--json").stdout)["reason"]
    for rule in ("--all", "--outdated"):
        done = daemon.sevhop("upgrade", rule, "--json")
        found = {row["guest"]: row for row in json.loads(done.stdout)["domains"]}
        assert done.returncode == 1
        assert found[guest.name]["outcome"] == "refused"
        assert "sevhop recover" in found[guest.name]["reason"]
    daemon.sevhop("status", "--metrics-dir", "/run")
    samples = (daemon.root / "run/sevhop.prom").read_text().splitlines()
    assert any(re.fullmatch(r'sevhop_\w+\{place="transit"\} 1', line) for line in samples)
    (daemon.root / "run/sevhop.prom").unlink()
    assert daemon.sevhop("recover").returncode == 0
    guest.wait_for_ticks()


@pytest.mark.parametrize("words", [["recover"], ["uninstall"], ["status"]], ids=" ".join)
def test_user_without_rights_gets_one_line(daemon: Daemon, start: StartDomain, new: Path, words: list[str]) -> None:
    """Also if the socket of libvirt is open to that user."""
    guest = start()
    guest.wait_for_ticks()
    assert daemon.upgrade(guest.name, "--emulator", new, "--prepare")["outcome"] == "prepared"
    done = as_nobody(daemon, *words)
    assert done.returncode == 1, done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("sevhop: ")
    assert "run sevhop as root" in line
    done = as_nobody(daemon, *words, "--json")
    assert "run sevhop as root" in json.loads(done.stdout)["reason"]
    assert done.stderr == ""
    assert daemon.sevhop("recover").returncode == 0
    guest.wait_for_ticks()


def as_nobody(daemon: Daemon, *words: str) -> Any:
    command = (*AS_NOBODY, sys.executable, "-m", "sevhop.cli")
    if daemon.run(*command, "--version").returncode:
        pytest.skip("this tree cannot be read by other users")
    return daemon.run(*command, *words)


def test_hook_is_probed_once_for_all_domains(daemon: Daemon, start: StartDomain) -> None:
    """Each probe is an error in the log of the daemon, and a call of every hook for a domain that nobody has."""
    for name in ("probed-1", "probed-2", "probed-3"):
        start(name=name)
    log = daemon.root / "run/probes.log"
    other = daemon.root / "etc/libvirt/hooks/qemu"
    other.write_text('#!/bin/sh\necho "$1 $2/$3" >>/run/probes.log\n')
    other.chmod(0o755)
    try:
        daemon.restart()
        for _ in range(2):
            assert daemon.sevhop("status").returncode == 0
        calls = log.read_text().splitlines() if log.exists() else []
    finally:
        other.unlink()
        log.unlink(missing_ok=True)
        daemon.restart()
    assert len([call for call in calls if "probe" in call]) <= 1
