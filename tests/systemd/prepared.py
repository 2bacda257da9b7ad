"""An upgrade that was prepared: its guest runs in the transit, and the unit that has brought it there has ended."""

from __future__ import annotations

from pathlib import Path

from tests.support.guests.daemon import DomainGuest

from .conftest import OPTIONS, Host


def prepare(host: Host, guest: DomainGuest) -> Path:
    """Prepare one. :return: the image."""
    report = host.upgrade(guest.name, "--prepare", *OPTIONS)
    assert (report["outcome"], report["reason"]) == ("prepared", "")
    return Path(report["image"])


def complete(host: Host, guest: DomainGuest, image: Path) -> None:
    """As any client does."""
    host.virsh("restore", image)
    guest.wait_for_ticks()
