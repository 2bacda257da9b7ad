"""What a reboot of a guest is after a hop: which guests can be reset, and what check reports."""

from __future__ import annotations

import pytest
from sevhop.checks import reboot as reboot_check
from sevhop.guest import reboot
from sevhop.guest.inspection import Guest, SevContext
from sevhop.guest.runtime_settings import Settings
from sevhop_qmp.ram_blocks import RamBlock

from .inspected_guest import guest

UUID = "11111111-2222-3333-4444-55555555550a"


def sev_guest(blocks: dict[str, bool], kind: str = "sev") -> Guest:
    """One with these RAM blocks, shared or private."""
    described = {
        name: RamBlock(name, 1 << 40, 4096, 4096, ("00:01", 7) if shared else None, shared)
        for name, shared in blocks.items()
    }
    return guest(context=SevContext(kind, 1), blocks=described)


@pytest.mark.parametrize("firmware", ["pc.bios", "system.flash0"])
def test_guest_can_be_reset_if_its_firmware_is_shared(firmware: str) -> None:
    assert not reboot.stops(sev_guest({firmware: True, "vga.vram": False}))


@pytest.mark.parametrize(
    "blocks", [{"pc.bios": False}, {"pc.bios": True, "system.flash0": False}, {"pc.ram": True}, {}]
)
def test_guest_cannot_be_reset_if_its_firmware_may_be_private(blocks: dict[str, bool]) -> None:
    assert reboot.stops(sev_guest(blocks))


def test_sev_es_guest_cannot_be_reset() -> None:
    assert reboot.stops(sev_guest({"system.flash0": True}, "sev-es"))


def test_guest_without_sev_can_be_reset() -> None:
    assert not reboot.stops(sev_guest({"pc.bios": False}, "none"))


def test_destination_shuts_down_at_a_reboot_only_if_it_must() -> None:
    ours = Settings(actions={"reboot": "reset", "panic": "pause"})
    assert reboot.settings_after_hop(sev_guest({"pc.bios": True}), ours) == ours
    theirs = reboot.settings_after_hop(sev_guest({"pc.bios": False}), ours)
    assert theirs == Settings(actions={"reboot": "shutdown", "panic": "pause"})


def test_check_reports_what_a_reboot_will_be() -> None:
    assert reboot_check.standalone(guest()) == reboot_check.domain(guest(), "restart", persistent=True) == []
    (as_before,) = reboot_check.standalone(sev_guest({"pc.bios": True}))
    assert (as_before.detail, as_before.hint) == ("as before the hop: the firmware is in shared memory", "")
    (shutdown,) = reboot_check.standalone(sev_guest({"pc.bios": False}))
    assert shutdown.detail.startswith("a shutdown after the hop: ")
    assert shutdown.hint.endswith("-machine aux-ram-share=on")
    (es,) = reboot_check.standalone(sev_guest({"pc.bios": True}, "sev-es"))
    assert es.detail == "a shutdown after the hop: no QEMU can reset an SEV-ES guest after a hop"


@pytest.mark.parametrize(
    ("action", "then"), [("restart", "starts the domain again"), ("destroy", "leaves the domain off")]
)
def test_check_of_a_domain_reports_its_action(action: str, then: str) -> None:
    (result,) = reboot_check.domain(sev_guest({"pc.bios": False}), action, persistent=True)
    assert f"<on_reboot> ({action}) {then}" in result.detail
    assert "<qemu:arg value='aux-ram-share=on'/>" in result.hint


def test_check_of_a_transient_domain_promises_no_start() -> None:
    (result,) = reboot_check.domain(sev_guest({"pc.bios": False}), "restart", persistent=False)
    assert result.detail.startswith("a shutdown after the hop, with which a transient domain is gone: ")
