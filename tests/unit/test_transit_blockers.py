"""What a transit cannot carry, by the domain's XML and process."""

from __future__ import annotations

from typing import Any

import pytest
from sevhop.engine.transit_blockers import blocker
from sevhop.libvirt import lock_manager


class Process:
    """The domain's QEMU."""

    def __init__(self, confinement: str = "") -> None:
        self.confinement = confinement


@pytest.fixture(autouse=True)
def leases(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    found = {"in use": False}
    monkeypatch.setattr(lock_manager, "in_use", lambda: found["in use"])
    return found


def reason(devices: str = "", confinement: str = "") -> str:
    process: Any = Process(confinement)
    return blocker(f"<domain><devices>{devices}</devices></domain>", process)


def test_usual_domain_can_be_carried() -> None:
    devices = """<disk type='file'><source file='/a'/></disk>
      <interface type='bridge'><source bridge='virbr0'/><mtu size='1400'/></interface>
      <interface type='network'><source network='default' portid='1' bridge='virbr0'/></interface>
      <interface type='user'/><graphics type='vnc'/><video><model type='vga'/></video>
      <rng><backend model='random'>/dev/urandom</backend></rng>"""
    assert reason(devices) == ""
    assert reason(confinement="unconfined") == ""


@pytest.mark.parametrize(
    "devices",
    [
        "<tpm model='tpm-crb'><backend type='emulator'/></tpm>",
        "<graphics type='spice'/>",
        "<video><model type='qxl'/></video>",
        "<redirdev type='tcp'/>",
        "<hostdev mode='subsystem'/>",
        "<filesystem type='mount'/>",
        "<memory model='dimm'/>",
        "<interface type='direct'><source dev='eth0' mode='vepa'/></interface>",
        "<interface type='network'><source network='lan' dev='eth0' mode='bridge'/></interface>",
        "<interface type='network'><source network='lan' portgroup='slow'/></interface>",
        "<interface type='bridge'><virtualport type='openvswitch'/></interface>",
        "<interface type='bridge'><filterref filter='clean-traffic'/></interface>",
        "<interface type='bridge'><bandwidth><inbound average='1000'/></bandwidth></interface>",
        "<interface type='ethernet'><script path='/etc/qemu-ifup'/></interface>",
        "<interface type='user'><backend type='passt'/></interface>",
        "<interface type='vhostuser'/>",
        "<disk type='block'><source dev='/dev/sda'><reservations managed='yes'/></source></disk>",
        "<rng><backend model='egd' type='tcp'/></rng>",
        "<lease><key>a</key></lease>",
    ],
)
def test_what_libvirt_takes_back_cannot_be_carried(devices: str) -> None:
    assert reason(devices)


def test_confined_qemu_cannot_be_carried() -> None:
    assert "libvirt-1234 (enforce)" in reason(confinement="libvirt-1234 (enforce)")


def test_leases_cannot_be_carried(leases: dict[str, bool]) -> None:
    leases["in use"] = True
    assert "leases" in reason()
