"""What happens to libvirt's hook while a domain is restored."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.support.guests.daemon import Daemon, DomainGuest, kill
from tests.support.guests.running import wait_until

from .conftest import StartDomain
from .holding import Checkpoint, HeldUpgrade

_SCRIPT = Path("/etc/libvirt/hooks/qemu.d/sevhop")


def assert_came_back(daemon: Daemon, guest: DomainGuest, old: Path, new: Path) -> None:
    """The guest runs in the old emulator and lost nothing, nothing is left behind, and another upgrade works."""
    assert guest.emulator() == guest.emulator("--inactive") == str(old)
    guest.wait_for_ticks()
    assert daemon.left_over() == []
    assert daemon.upgrade(guest.name, "--emulator", new)["outcome"] == "done"
    guest.wait_for_ticks()


def name_of(pid: int) -> str:
    """As the process calls itself."""
    return Path(f"/proc/{pid}/comm").read_text().strip()


def with_words(daemon: Daemon, *words: str) -> list[int]:
    """The processes in there that have all of these on their command line."""
    found = []
    for pid in daemon.processes():
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
        if all(word.encode() in line for word in words):
            found.append(pid)
    return found


def test_killed_while_the_keeper_commits(daemon: Daemon, start: StartDomain, old: Path, new: Path) -> None:
    """libvirt takes that for a refusal, whatever the keeper has done meanwhile."""
    guest = start()
    guest.wait_for_ticks()
    with (
        Checkpoint.at(daemon, guest, "started/begin") as checkpoint,
        HeldUpgrade.at("restore", guest, new) as upgrade,
    ):
        upgrade.resume()
        checkpoint.wait()
        [keeper] = (pid for pid in daemon.processes() if name_of(pid) == "sevhop-keeper")
        os.kill(keeper, signal.SIGSTOP)
        try:
            checkpoint.release()
            wait_until(lambda: bool(with_words(daemon, guest.name, "started", "sevhop")), 60, "the hook runs")
            for pid in with_words(daemon, guest.name, "started", "sevhop"):
                kill(pid)
        finally:
            os.kill(keeper, signal.SIGCONT)
        report = upgrade.go_on()
    assert (report["status"], report["outcome"]) == (3, "undone"), report
    assert_came_back(daemon, guest, old, new)


def test_called_by_somebody_else_at_once(daemon: Daemon, start: StartDomain, old: Path, new: Path) -> None:
    """It is answered once. Should libvirt's own call come too late, libvirt drops the destination."""
    guest = start()
    guest.wait_for_ticks()
    xml = f"<domain><uuid>{daemon.virsh('domuuid', guest.name)}</uuid></domain>"
    call = f"echo '{xml}' | {_SCRIPT} {guest.name} started begin -"
    with (
        Checkpoint.at(daemon, guest, "started/begin") as checkpoint,
        HeldUpgrade.at("restore", guest, new) as upgrade,
    ):
        upgrade.resume()
        checkpoint.wait()
        calls = [daemon.start_command("sh", "-c", call) for _ in range(4)]
        for one in calls:
            one.communicate(timeout=60)
        checkpoint.release()
        report = upgrade.go_on()
    assert sorted(one.returncode for one in calls) == [0, 1, 1, 1]
    assert (report["status"], report["outcome"]) == (3, "undone"), report
    assert_came_back(daemon, guest, old, new)


def test_a_domain_in_no_hop_costs_no_python(daemon: Daemon, start: StartDomain) -> None:
    """Its hook works without a Python, even while another domain is in a hop."""
    guest = start()
    guest.wait_for_ticks()
    held = start(name="held")
    held.wait_for_ticks()
    image = daemon.upgrade(held.name, "--prepare")["image"]
    inside = daemon.root / str(_SCRIPT).lstrip("/")
    script = inside.read_text()
    inside.write_text(script.replace("python", "no-such-python"))
    assert inside.read_text() != script
    try:
        assert daemon.run("virsh", "managedsave", guest.name).returncode == 0
        daemon.virsh("start", guest.name)
        guest.wait_for_ticks()
    finally:
        inside.write_text(script)
    daemon.virsh("restore", image)
    held.wait_for_ticks()
    assert daemon.sevhop("recover").returncode == 0
