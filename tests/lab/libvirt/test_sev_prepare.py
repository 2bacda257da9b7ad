"""``sevhop prepare`` of an SEV domain: started again, it can hop, and then it reboots as before the hop."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.guests import emulators, real_mode
from tests.support.guests.daemon import Daemon, Description, DomainGuest


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """A daemon, with sevhop's hook. Starting it and having it probe a QEMU takes minutes in emulation."""
    with Daemon.installed() as daemon:
        yield daemon


def check_of(daemon: Daemon, guest: DomainGuest) -> dict[str, dict[str, Any]]:
    """The tests of ``sevhop check``, by name."""
    todo = [json.loads(daemon.sevhop("check", "--json", guest.name).stdout)]
    found = {}
    while todo:
        one = todo.pop()
        found[one["name"]] = one
        todo += one["children"]
    return found


@pytest.mark.one_kernel("6.12")
@pytest.mark.long
def test_prepared_sev_domain_can_hop_when_it_is_started_again(daemon: Daemon) -> None:
    description = Description(
        "sev",
        emulators.emulator(emulators.NEW),
        "kvm",
        32,
        memory="private",
        firmware=real_mode.firmware(),
        sev=True,
    )
    guest = DomainGuest.start(daemon, description)
    try:
        guest.wait_for_ticks()
        done = daemon.sevhop("prepare", "--json", guest.name)
        (row,) = json.loads(done.stdout)["domains"]
        assert (done.returncode, row["outcome"], len(row["changes"])) == (0, "done", 3), done
        assert row["restart_required"].startswith("memory: ")

        daemon.virsh("destroy", guest.name)
        guest.file("log").unlink()
        daemon.virsh("start", guest.name)
        guest.wait_for_ticks()
        tests = check_of(daemon, guest)
        assert [name for name, one in tests.items() if one["status"] == "fail"] == []
        assert tests["reboot"]["detail"] == "as before the hop: the firmware is in shared memory"
        # 32 MiB of the guest, and 1 GiB.
        assert "<hard_limit unit='KiB'>1081344</hard_limit>" in guest.xml()
    finally:
        guest.end()
