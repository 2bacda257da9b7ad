"""The clock of a guest that was stopped for long is set by its guest agent; the guest prints that it was asked to."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.guests import linux
from tests.support.guests.build import Unavailable
from tests.support.guests.daemon import Daemon, DomainGuest
from tests.support.guests.enclosure import GUESTS
from tests.support.guests.lines import Line
from tests.support.guests.running import wait_until

from .conftest import StartDomain
from .failing import another_hook

AGENT = f"""<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <channel type='unix'><source mode='bind' path='{GUESTS}/agents-neighbour'/>
      <target type='virtio' name='org.example.channel'/></channel>"""
WORDS = ("--no-transit", "--no-rehearsal", "--timeout", "60")
#: A hook for which the guest waits.
SLOW = '[ "$2/$3" = restore/begin ] && sleep 1.1\nexit 0'


@pytest.fixture
def guest(start: StartDomain) -> DomainGuest:
    """Linux, with an agent that libvirt reaches."""
    try:
        images = linux.images()
    except Unavailable as err:
        pytest.skip(f"no Linux guest: {err}")
    guest = start(accelerator="tcg", memory_mib=256, more=AGENT, linux=images)
    guest.wait_for_ticks()
    wait_until(lambda: "state='connected'" in guest.xml(), 60, "the agent is connected")
    return guest


def times_set(guest: DomainGuest) -> int:
    """How often its agent was asked to set the clock."""
    return guest.file("log").read_text(errors="replace").count("CLOCK SET")


def test_agent_sets_the_clock_after_a_long_stop_unless_that_is_not_wanted(
    daemon: Daemon, guest: DomainGuest, old: Path, new: Path
) -> None:
    with another_hook(daemon, SLOW):
        report = daemon.upgrade(guest.name, *WORDS, "--emulator", new)
        assert (report["outcome"], report["stopped_ms"] > 1e3) == ("done", True), report
        assert report["clock"] == {"set": True, "detail": ""}
        wait_until(lambda: times_set(guest) == 1, 60, "the guest prints it")
        report = daemon.upgrade(guest.name, *WORDS, "--emulator", old, "--no-set-time")
        assert (report["outcome"], report["clock"]) == ("done", {"set": False, "detail": "--no-set-time"}), report
    guest.wait_for_ticks()
    assert times_set(guest) == 1


def test_agent_that_hangs_fails_no_upgrade(daemon: Daemon, guest: DomainGuest, new: Path) -> None:
    assert Line.to_socket(daemon.root / f"{GUESTS}/agents-neighbour".lstrip("/")).answers("MUTE")
    with another_hook(daemon, SLOW):
        report = daemon.upgrade(guest.name, *WORDS, "--emulator", new)
    assert (report["outcome"], report["clock"]["set"]) == ("done", False), report
    assert report["clock"]["detail"] == "libvirt did not answer within 5 s"
    guest.wait_for_ticks()
    assert times_set(guest) == 0
