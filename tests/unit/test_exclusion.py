"""Which domains a rule leaves out; the daemon is simulated."""

from __future__ import annotations

import asyncio

import libvirt
import pytest
from sevhop.engine import fleet
from sevhop.engine.fleet import Selection

from .defined_domains import FakeDaemon, FakeDomain, FakeLibvirt, connect


class Vanishing(FakeDomain):
    """It ends right after it was found."""

    def metadata(self, _: int, __: str, ___: int) -> str:
        raise FakeLibvirt("no domain with matching uuid", libvirt.VIR_ERR_NO_DOMAIN)


def test_all_leaves_out_who_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a domain that libvirt does not know, as in its hop, the name counts; its upgrade is refused then."""
    daemon = FakeDaemon(
        FakeDomain("web", ""),
        FakeDomain("db-1", ""),
        FakeDomain("alone", "", left_alone=(libvirt.VIR_DOMAIN_AFFECT_CURRENT,)),
        FakeDomain("alone-from-the-next-start", "", left_alone=(libvirt.VIR_DOMAIN_AFFECT_CONFIG,)),
        Vanishing("vanishing", ""),
    )
    connect(daemon, monkeypatch)
    monkeypatch.setattr(fleet, "unattended", lambda: ["db-2", "hopping"])
    selection = asyncio.run(fleet.all_active("qemu:///system", ["db-*"]))
    chosen = ("alone-from-the-next-start", "hopping", "vanishing", "web")
    assert selection == Selection(chosen, True, ("alone", "db-1", "db-2"))
