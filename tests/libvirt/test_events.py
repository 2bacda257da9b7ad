"""What libvirt's clients see of an upgrade: exactly the events that the documentation lists."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.guests.daemon import Daemon, kill
from tests.support.guests.running import processes_of_domain

from . import listening
from .conftest import StartDomain
from .failing import other_hook_refuses
from .holding import PausedUpgrade

_PAGE = Path(__file__).parents[2] / "docs/clients.md"
_PROGRAM = Path(listening.__file__)
_MARKER = "<domain type='qemu'><name>marker</name><memory>1</memory><os><type arch='x86_64'>hvm</type></os></domain>"
#: A row of a table that begins with an event and its detail.
_ROW = re.compile(r"\| `(?P<event>[a-z]+ [a-z_]+)` \|")


@dataclass
class Seen:
    """The events of a domain, as a client sees them, and the ids that it had."""

    names: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)


@contextlib.contextmanager
def recorded(daemon: Daemon, name: str) -> Iterator[Seen]:
    """The events of a domain; known at the end of the context."""
    seen = Seen()
    client = daemon.start_command(sys.executable, _PROGRAM)
    try:
        assert client.stdout is not None
        assert client.stdout.readline() == "listening\n"
        yield seen
        # Whatever has happened before comes before this.
        (daemon.root / "run/marker.xml").write_text(_MARKER)
        daemon.virsh("define", "/run/marker.xml")
        while (line := client.stdout.readline()) and not line.startswith("marker "):
            domain, number, event = line.strip().split(" ", 2)
            assert domain == name
            seen.names.append(event)
            seen.ids.append(int(number))
        assert line, client.stderr and client.stderr.read()
    finally:
        kill(client.pid)
        client.communicate()
        daemon.run("virsh", "undefine", "marker")


def documented(heading: str) -> list[str]:
    """The events of the table under a heading."""
    _, _, text = _PAGE.read_text(encoding="utf-8").partition(f"## {heading}\n")
    return _ROW.findall(text.partition("\n## ")[0])


def test_clients_see_the_documented_events_of_an_upgrade(
    daemon: Daemon, start: StartDomain, old: Path, new: Path
) -> None:
    guest = start()
    guest.wait_for_ticks()
    for emulator in (new, old):  # the second time the first hop does not go by way of libvirt
        before = int(daemon.virsh("domid", guest.name))
        with recorded(daemon, guest.name) as seen:
            assert daemon.upgrade(guest.name, "--emulator", emulator)["outcome"] == "done"
        assert seen.names == documented("An upgrade")
        after = int(daemon.virsh("domid", guest.name))
        assert seen.ids == [before, -1, after, after, after]
    guest.wait_for_ticks()


@pytest.mark.virtqemud
def test_clients_see_the_documented_events_of_a_rollback(daemon: Daemon, start: StartDomain, new: Path) -> None:
    guest = start()
    guest.wait_for_ticks()
    before = int(daemon.virsh("domid", guest.name))
    with recorded(daemon, guest.name) as seen, PausedUpgrade.at("map", guest, new) as upgrade:
        upgrade.interrupt()
        assert upgrade.finish()["outcome"] == "rolled-back"
    assert seen.names == documented("An upgrade that is rolled back")
    assert seen.ids == [before, before]
    guest.wait_for_ticks()


def test_clients_see_the_documented_events_of_an_upgrade_that_libvirt_does_not_complete(
    daemon: Daemon, start: StartDomain, new: Path
) -> None:
    guest = start()
    guest.wait_for_ticks()
    before = int(daemon.virsh("domid", guest.name))
    with recorded(daemon, guest.name) as seen, other_hook_refuses(daemon):
        assert daemon.upgrade(guest.name, "--emulator", new)["outcome"] == "rolled-back"
    assert seen.names == documented("An upgrade that libvirt does not complete")
    after = int(daemon.virsh("domid", guest.name))
    assert after > before
    assert seen.ids == [before, -1, after, after]
    guest.wait_for_ticks()


def test_clients_see_no_event_of_a_guest_that_ends_in_the_transit(
    daemon: Daemon, start: StartDomain, new: Path
) -> None:
    """They have been notified of the end of the domain before; sevhop reports it, and libvirt may start it again."""
    guest = start()
    guest.wait_for_ticks()
    with recorded(daemon, guest.name) as seen:
        assert daemon.upgrade(guest.name, "--emulator", new, "--prepare")["outcome"] == "prepared"
        (transit,) = processes_of_domain(guest.name)
        kill(transit)
        done = daemon.sevhop("status", guest.name)
        reported = [
            f"{guest.name}: the guest is off: ",
            f"{guest.name}: the transit has exited, in which the guest was",
        ]
        assert (done.returncode, done.stdout.startswith(tuple(reported))) == (4, True), done
        assert f"run: sevhop recover {guest.name}" in done.stdout
        assert daemon.sevhop("recover", guest.name).returncode == 5
        assert daemon.sevhop("status").returncode == 0
    assert seen.names == documented("A prepared upgrade")


def test_clients_see_the_documented_events_of_a_prepared_upgrade(daemon: Daemon, start: StartDomain, new: Path) -> None:
    guest = start()
    guest.wait_for_ticks()
    with recorded(daemon, guest.name) as seen:
        assert daemon.upgrade(guest.name, "--emulator", new, "--prepare")["outcome"] == "prepared"
    assert seen.names == documented("A prepared upgrade")
    with recorded(daemon, guest.name) as seen:
        assert daemon.sevhop("recover", guest.name).returncode == 0
    assert seen.names == documented("An upgrade")[2:], "the rest"
    guest.wait_for_ticks()
