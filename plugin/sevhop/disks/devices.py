"""
The devices that a guest has now: which they are (:func:`read`), and those that were plugged since the start, as
arguments of ``-device`` (:func:`plugged`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sevhop_qmp.errors import CommandError
from sevhop_qmp.invalid_data import protocol_errors
from sevhop_qmp.monitor import Commands

from ..guest.command_line import parse

#: Devices that may have been plugged: QEMU reports all properties that they were created with.
PLUGGABLE = frozenset({"virtio-blk-pci", "virtio-scsi-pci", "scsi-hd", "scsi-cd", "virtio-rng-pci"})
#: Network cards, of which the same is true. QEMU does not report their backends.
CARDS = frozenset({"virtio-net-pci", "e1000", "e1000e", "rtl8139", "igb", "vmxnet3", "pcnet", "ne2k_pci", "usb-net"})
#: Properties that follow from where a device is, or from others.
_DERIVED = frozenset({"addr", "legacy-addr", "busnr", "type", "parent_bus", "realized", "hotplugged", "hotpluggable"})

#: QOM paths of those with an id, and of those without.
PERIPHERAL = "/machine/peripheral"
ANONYMOUS = "/machine/peripheral-anon"


class Device(NamedTuple):
    """
    A device of the guest that was created by an option, or plugged.

    :ivar address: slot and function on its PCI bus, in the form of ``addr=``; empty on other buses.
    :ivar plugged: whether it was plugged since the start; an option with its id describes another device.
    """

    path: str
    driver: str
    address: str
    plugged: bool = False

    @property
    def name(self) -> str:
        """Its id."""
        return self.path.rpartition("/")[2]


async def read(monitor: Commands) -> dict[str, Device]:
    """
    All devices that were created by options or plugged, by QOM path.

    :raises SevhopError: QEMU does not answer.
    """
    found = {}
    with protocol_errors(monitor.name):
        for container in (PERIPHERAL, ANONYMOUS):
            for row in await monitor.execute("qom-list", {"path": container}):
                if row["type"].startswith("child<"):
                    path = f"{container}/{row['name']}"
                    driver = row["type"].removeprefix("child<").removesuffix(">")
                    hotplugged = await _property(monitor, path, "hotplugged")
                    found[path] = Device(path, driver, await _address(monitor, path), hotplugged is True)
    return found


async def _address(monitor: Commands, path: str) -> str:
    devfn = await _property(monitor, path, "addr")
    return f"{devfn >> 3:#x}.{devfn & 7:x}" if isinstance(devfn, int) and devfn >= 0 else ""


async def _property(monitor: Commands, path: str, name: str) -> Any:
    """None if it has none of that name."""
    try:
        return await monitor.execute("qom-get", {"path": path, "property": name})
    except CommandError:
        return None


async def plugged(
    monitor: Commands,
    arguments: Sequence[str],
    present: Mapping[str, Device],
    drivers: frozenset[str] = PLUGGABLE,
) -> list[dict[str, Any]]:
    """
    What was plugged, each as an argument of ``-device``.

    :param arguments: of the source.
    :param drivers: which are wanted: disks, controllers and random number generators, or :data:`CARDS`.
    :raises SevhopError: QEMU does not answer.
    """
    known = {option.properties().get("id") for option in parse(list(arguments)) if option.name == "device"}
    found = []
    for device in present.values():
        new = device.plugged or device.name not in known
        if device.path.startswith(PERIPHERAL + "/") and new and device.driver in drivers:
            with protocol_errors(monitor.name):
                found.append(await _described(monitor, device, device.name))
    return found


def without_unknown(devices: Sequence[Mapping[str, Any]], known: Mapping[str, frozenset[str]]) -> list[dict[str, Any]]:
    """
    Plugged devices for another emulator. A boolean that it does not know was set by the machine type for compatibility
    with older versions, and is what the older version does without it.

    :param known: properties by driver.
    """
    return [
        {
            key: value
            for key, value in device.items()
            if not isinstance(value, bool) or key in known.get(str(device["driver"]), (key,))
        }
        for device in devices
    ]


async def _described(monitor: Commands, device: Device, name: str) -> dict[str, Any]:
    bus = await monitor.execute("qom-get", {"path": device.path, "property": "parent_bus"})
    result: dict[str, Any] = {"driver": device.driver, "id": name, "bus": str(bus).rpartition("/")[2]}
    if device.address:
        result["addr"] = device.address
    for row in await monitor.execute("device-list-properties", {"typename": device.driver}):
        prop, kind = str(row["name"]), str(row["type"])
        if prop in _DERIVED or prop.startswith("x-") or kind.startswith("child<"):
            continue
        try:
            value = await monitor.execute("qom-get", {"path": device.path, "property": prop})
        except CommandError:
            continue
        if kind.startswith("link<"):
            value = str(value).rpartition("/")[2] if kind == "link<iothread>" else ""
        if value not in ("", None) and ("default-value" not in row or value != row["default-value"]):
            result[prop] = value
    return result
