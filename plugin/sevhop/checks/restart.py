"""
Can libvirt start this domain again? An upgrade ends the old QEMU, and has libvirt start a new one with the same XML.
What was there when the domain was started may not be there any more. Read-only.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from sevhop_qmp.errors import SevhopError
from sevhop_qmp.invalid_data import protocol_errors
from sevhop_qmp.monitor import Commands
from sevhop_qmp.process import QemuProcess

from ..cancellation import shielded
from ..disks import devices
from ..disks.block_graph import BlockGraph
from ..guest import command_line
from ..guest.inspection import Guest
from ..install import verification
from ..libvirt import domain_xml, resources
from ..libvirt.connection import Connection
from . import domain_files
from .result import CheckResult, failed, passed

#: RAM block of firmware that is no flash.
_ROM = "pc.bios"


@dataclass(frozen=True)
class Subject:
    """
    What is tested.

    :ivar xml: the domain as it runs, in the form of a save image.
    :ivar live_xml: the same, with what libvirt has chosen for it.
    :ivar old, new: the emulator it runs in, and the one to upgrade to.
    """

    monitor: Commands
    process: QemuProcess
    guest: Guest
    disks: BlockGraph
    xml: str
    live_xml: str
    old: str
    new: str


async def examine(connection: Connection, subject: Subject) -> CheckResult:
    """
    Test whether libvirt can start the domain in the new emulator.

    :raises SevhopError: QEMU does not answer.
    """
    domain = ElementTree.fromstring(subject.xml)
    anonymous = await _anonymous(subject.monitor)
    children = [
        # In a thread: as QEMU's user files are tested by other processes.
        await shielded(asyncio.to_thread(_files, domain, subject)),
        _sockets(domain),
        _firmware(domain, subject),
        await _networks(connection, domain),
        await _volumes(connection, domain),
        await _secrets(connection, domain),
        await processor(connection, subject.xml, subject.old, subject.new),
        _alias(subject),
        _plugged(subject, anonymous),
        _hooks(),
    ]
    return passed("restart", "what libvirt needs to start it in another QEMU", *children)


def _files(domain: ElementTree.Element, subject: Subject) -> CheckResult:
    name = "files"
    user = subject.process.credentials
    files = domain_files.of(domain, subject.disks, dynamic=domain_files.ownership_is_dynamic())
    found = [reason for file in files if (reason := domain_files.obstacle(file, user))]
    found += domain_files.without_directory(domain)
    if found:
        return failed(name, "; ".join(found), "restore the file, its directory or its mode; or remove the device")
    return passed(name, f"{len(files)} can be opened")


def _sockets(domain: ElementTree.Element) -> CheckResult:
    name = "sockets"
    if found := domain_files.without_server(domain):
        return failed(name, "; ".join(found), "start the server, or remove the device (virsh detach-device)")
    return passed(name, "all servers listen")


def _firmware(domain: ElementTree.Element, subject: Subject) -> CheckResult:
    """QEMU loads a state only if flash and firmware have the size that they had."""
    name = "firmware size"
    found = []
    rom = domain.find("os/loader[@type='rom']")
    sizes = {}
    if rom is not None and rom.text and _ROM in subject.guest.blocks:
        sizes[rom.text.strip()] = subject.guest.blocks[_ROM].used
    for disk in subject.disks.disks.values():
        if (
            disk.root
            and disk.qdev.startswith(domain_files.FLASH)
            and subject.disks.nodes[disk.root].driver in ("raw", "file")
        ):
            sizes[subject.disks.image_of(disk.root)] = subject.disks.nodes[disk.root].size
    for path, size in sizes.items():
        try:
            now = os.stat(path).st_size
        except OSError:
            continue  # it is one of the files
        if now != size:
            found.append(f"{path} has {now} bytes, and {size} when the domain was started")
    if found:
        hint = "put the old file back, name it in the domain (virsh edit), or shut the domain down and start it"
        return failed(name, "; ".join(found), hint)
    return passed(name, "as it was")


async def _networks(connection: Connection, domain: ElementTree.Element) -> CheckResult:
    name = "networks"
    found, hints = [], []
    for card in domain.iterfind("devices/interface"):
        source = card.find("source")
        of = source.attrib if source is not None else {}
        filters = [element.get("filter", "") for element in card.iterfind("filterref")]
        if card.get("type") == "network" and (reason := await resources.network(connection, of.get("network", ""))):
            found.append(reason)
            hints.append(f"virsh net-start {shlex.quote(of.get('network', ''))}")
        if card.get("type") == "bridge" and not _is_card(of.get("bridge", "")):
            found.append(f"there is no bridge {of.get('bridge')}")
        if card.get("type") == "direct" and not _is_card(of.get("dev", "")):
            found.append(f"there is no network card {of.get('dev')}")
        for one in filters:
            if reason := await resources.network_filter(connection, one):
                found.append(reason)
    if found:
        hint = ", ".join(dict.fromkeys(hints)) or "create it, or remove the card (virsh detach-interface)"
        return failed(name, "; ".join(dict.fromkeys(found)), hint)
    return passed(name, "all are there")


def _is_card(name: str) -> bool:
    try:
        return bool(socket.if_nametoindex(name))
    except OSError:
        return False


async def _volumes(connection: Connection, domain: ElementTree.Element) -> CheckResult:
    name = "storage pools"
    found = []
    for source in domain.iterfind("devices/disk[@type='volume']/source"):
        pool, volume = source.get("pool", ""), source.get("volume", "")
        try:
            await resources.volume_path(connection, pool, volume)
        except SevhopError as err:
            found.append(f"volume {volume} of pool {pool}: {err.message}")
    if found:
        return failed(name, "; ".join(found), "virsh pool-start, virsh pool-refresh")
    return passed(name, "all are active")


async def _secrets(connection: Connection, domain: ElementTree.Element) -> CheckResult:
    name = "secrets"
    found = []
    elements = list(domain.iterfind("devices/disk//secret"))
    for encryption in domain.iterfind("devices/tpm/backend/encryption"):
        elements.append(ElementTree.Element("secret", {"uuid": encryption.get("secret", "")}))
    for element in elements:
        if reason := await resources.secret(connection, element):
            found.append(reason)
    if found:
        hint = "define it again, and set its value (virsh secret-define, secret-set-value)"
        return failed(name, "; ".join(dict.fromkeys(found)), hint)
    return passed(name, f"{len(elements)} in use" if elements else "none in use")


async def processor(connection: Connection, xml: str, old: str, new: str) -> CheckResult:
    """
    libvirt compares a processor with what an emulator has, where its XML wants that. What the guest really has is
    compared when the new QEMU has started.

    :param xml: of the domain as it runs.
    :param old, new: the emulator it was started in, and the one to start it in.
    """
    name = "processor"
    cpu = ElementTree.fromstring(xml).find("cpu")
    if cpu is None or cpu.find("model") is None or cpu.get("check", "none") == "none":
        return passed(name, "libvirt does not compare it")
    described = domain_xml.describe(xml)
    text = ElementTree.tostring(cpu, encoding="unicode")
    kind = (described.arch, described.machine, described.kind, text)
    lost = await resources.processor(connection, new, *kind)
    # What both lack is not what the old one was started with.
    if lost and not (old != new and await resources.processor(connection, old, *kind)):
        return failed(name, f"{new}: {lost}", "choose another version of QEMU, or one with these features")
    return passed(name, "the new QEMU has all features in the XML")


def _alias(subject: Subject) -> CheckResult:
    name = "machine type alias"
    described = domain_xml.describe(subject.xml).machine
    has = subject.guest.machine_type
    if described and described != has:
        hint = f"shut the domain down, and start it with machine='{has}'"
        return failed(name, f"{described} is another machine in each QEMU, and {has} in this one", hint, restart=True)
    return passed(name, "none")


async def _anonymous(monitor: Commands) -> list[str]:
    """The drivers of devices without an id."""
    with protocol_errors(monitor.name):
        rows = await monitor.execute("qom-list", {"path": devices.ANONYMOUS})
        types = [str(row["type"]) for row in rows]
    return [kind.removeprefix("child<").removesuffix(">") for kind in types if kind.startswith("child<")]


def _plugged(subject: Subject, anonymous: Sequence[str]) -> CheckResult:
    """Devices that were plugged or unplugged without libvirt, which knows those in its XML."""
    name = "plugged devices"
    given = command_line.parse(subject.process.command_line[1:])
    options = [option.properties() for option in given if option.name == "device"]
    started = {option["id"] for option in options if "id" in option}
    aliases = {one.get("name", "") for one in ElementTree.fromstring(subject.live_xml).iterfind("devices//alias")}
    present = subject.guest.devices
    found = [
        f"{device} ({driver}) was plugged"
        for device, driver in present.items()
        if device not in started | aliases and not driver.endswith("-cpu")
    ]
    found += [f"{device} was unplugged" for device in sorted((started & aliases) - present.keys())]
    more = len(anonymous) - sum("id" not in option for option in options) - sum(map(_makes_device, given))
    if more > 0:
        drivers = Counter(anonymous)
        drivers.subtract(option.get("", option.get("driver", "")) for option in options if "id" not in option)
        named = ", ".join(driver for driver, number in drivers.items() if number > 0)
        found.append(f"a device without an id ({named}) was plugged")
    if found:
        hint = "undo it (virsh qemu-monitor-command), and use virsh attach-device and detach-device"
        return failed(name, f"libvirt does not know that {'; '.join(found)}", hint)
    return passed(name, "libvirt knows all")


def _makes_device(option: command_line.Option) -> bool:
    """Whether QEMU makes a device without an id of an option that is not ``-device``; an administrator's own."""
    return option.name == "virtfs" or (option.name == "drive" and option.properties().get("if") == "virtio")


def _hooks(hooks: Path = verification.HOOKS, ours: Path = verification.SCRIPT) -> CheckResult:
    name = "hooks"
    programs = [
        program for kind in ("qemu", "network") for program in (hooks / kind, *sorted((hooks / f"{kind}.d").glob("*")))
    ]
    others = [str(path) for path in programs if path != ours and path.is_file() and os.access(path, os.X_OK)]
    if not others:
        return passed(name, "no others")
    result = passed(name, f"libvirt calls others as well: {', '.join(others)}")
    result.hint = "an upgrade fails if one of them refuses, hangs, or prints anything"
    return result
