"""
Taps whose name the administrator has chosen (``<target dev='NAME'/>``). libvirt makes a tap of that name for the
destination while the transit still has the source's, so the transit's gets another name first.

Such a tap is libvirt's own and vanishes with the last QEMU that has it, so nothing has to be renamed back. The name of
a tap that is up can be changed since Linux 6.2 (net/core/dev.c, ``dev_change_name``); with an older kernel the tap is
down for that moment.
"""

from __future__ import annotations

import errno
import fcntl
import socket
import struct
from xml.etree import ElementTree

from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import QemuProcess

#: Prefix of the taps whose name libvirt has chosen: it takes one that is free.
_CHOSEN = "vnet"
#: The kernel replaces the conversion by the lowest number that is free.
_TEMPORARY = "sevhop%d"
_TUN = "/dev/net/tun"
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _SIOCSIFNAME = 0x8913, 0x8914, 0x8923
_IFF_UP = 0x1


def blocker(xml: str, source: QemuProcess) -> str:
    """
    Why the fixed taps of a domain cannot be renamed; empty if they can, or if there are none.

    :param xml: of the domain as it runs.
    :raises ProcessError: its QEMU has exited.
    """
    fixed = _fixed(xml)
    if not fixed:
        return ""
    own = _taps(source)
    for name, managed in fixed.items():
        if not managed:
            return f"the tap {name} is not libvirt's own, and only one QEMU can have it"
        if name not in own:
            return f"{name} is not a tap that its QEMU has open"
        try:
            socket.if_nametoindex(name)
        except OSError:
            return f"the tap {name} is in another network namespace"
    return ""


def rename(xml: str, transit: QemuProcess) -> dict[str, str]:
    """
    Give each fixed tap of a domain that its transit has another name. May be repeated.

    :param xml: of the domain as it ran.
    :return: the new names, by the fixed ones.
    :raises SevhopError: the transit has exited, or the kernel does not permit it.
    """
    renamed = {}
    # Without fixed ones nothing is looked up.
    if fixed := _fixed(xml):
        for name in fixed.keys() & _taps(transit):
            renamed[name] = _rename(name)
    return renamed


def _fixed(xml: str) -> dict[str, bool]:
    """The taps with a fixed name, and whether libvirt makes and deletes them."""
    targets = ElementTree.fromstring(xml).iterfind("devices/interface/target")
    names = {target.get("dev", _CHOSEN): target.get("managed", "yes") == "yes" for target in targets}
    return {name: managed for name, managed in names.items() if not name.startswith(_CHOSEN)}


def _taps(process: QemuProcess) -> set[str]:
    """The names that the taps of a QEMU have now (drivers/net/tun.c, ``tun_chr_show_fdinfo``)."""
    taps = [descriptor.number for descriptor in process.descriptors() if descriptor.target == _TUN]
    return {name for number in taps if (name := process.descriptor_info(number).get("iff"))}


def _rename(name: str) -> str:
    try:
        index = socket.if_nametoindex(name)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
            try:
                _set_name(control, name)
            except OSError as err:
                if err.errno != errno.EBUSY:
                    raise
                _rename_while_down(control, name, index)
        return socket.if_indextoname(index)
    except OSError as err:
        hint = f"give the tap {name} another name (ip link set {name} down; ip link set {name} name NAME up)"
        raise SevhopError(f"cannot rename the tap {name}: {err.strerror}", f"{hint}, then run sevhop recover") from err


def _rename_while_down(control: socket.socket, name: str, index: int) -> None:
    flags = _flags(control, name)
    _set_flags(control, name, flags & ~_IFF_UP)
    try:
        _set_name(control, name)
    finally:
        _set_flags(control, socket.if_indextoname(index), flags)


def _set_name(control: socket.socket, name: str) -> None:
    fcntl.ioctl(control, _SIOCSIFNAME, struct.pack("16s16s8x", name.encode(), _TEMPORARY.encode()))


def _flags(control: socket.socket, name: str) -> int:
    answer = fcntl.ioctl(control, _SIOCGIFFLAGS, struct.pack("16sh22x", name.encode(), 0))
    return int(struct.unpack("16sH22x", answer)[1])


def _set_flags(control: socket.socket, name: str, flags: int) -> None:
    fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", name.encode(), flags))
