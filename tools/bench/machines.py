"""The two kinds of machine, minimal and rich, of guests beside libvirt and of domains."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tests.support.guests import counter, linux
from tests.support.guests.daemon import Description
from tests.support.guests.machine import Accelerator, Machine

MINIMAL, RICH = KINDS = ("minimal", "rich")
#: MiB.
_DISK = 16
#: What :attr:`.Machine.rich` has.
_RICH_DEVICES = """
    <video><model type='vga'/></video>
    <controller type='usb' model='qemu-xhci'/>
    <input type='tablet' bus='usb'/>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
    <controller type='scsi' model='virtio-scsi'/>
    <controller type='virtio-serial'/>
    <sound model='ich6'/>
    <audio id='1' type='none'/>
"""
_BRIDGED = "<interface type='bridge'><source bridge='{}'/><model type='virtio'/></interface>"


def standalone(kind: str, directory: Path, accelerator: Accelerator, memory_mib: int) -> Machine:
    """The minimal one has neither a disk nor a network card."""
    minimal = Machine(directory, accelerator=accelerator, memory_mib=memory_mib, bios=counter.firmware())
    if kind == MINIMAL:
        return minimal
    return dataclasses.replace(minimal, uefi=True, rich=True, disk_mib=_DISK, network=True)


def like_domain(kind: str, directory: Path, accelerator: Accelerator, memory_mib: int) -> Machine:
    """With the devices of :func:`domain`."""
    machine = standalone(kind, directory, accelerator, memory_mib)
    return dataclasses.replace(machine, disk_mib=_DISK, network=True)


def domain(kind: str, name: str, emulator: Path, accelerator: Accelerator, memory_mib: int) -> Description:
    """Also the minimal one has a disk and a network card."""
    minimal = Description(name, emulator, accelerator, memory_mib=memory_mib, firmware=counter.firmware())
    if kind == MINIMAL:
        return minimal
    return dataclasses.replace(minimal, pflash=True, balloon="virtio", more=_RICH_DEVICES)


def linux_domain(kind: str, name: str, emulator: Path, bridge: str, memory_mib: int) -> Description:
    """
    The same with Linux, and its network card on a bridge. It is emulated, as wherever Linux does not run under KVM.

    :raises tests.support.guests.build.Unavailable: there is no Linux.
    """
    described = domain(kind, name, emulator, "tcg", memory_mib)
    interface = _BRIDGED.format(bridge)
    return dataclasses.replace(described, linux=linux.images(), uefi=kind == RICH, interface=interface)
