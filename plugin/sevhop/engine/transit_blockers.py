"""
Why a transit cannot carry a domain, as far as its XML and its process show; the command line shows the rest
(:mod:`sevhop.engine.transit_command_line`).

Most of it is what libvirt takes back when it shuts a domain off, while the guest runs on in the transit: a helper that
it ends, a setting of the host's network that it removes, a lease that it gives up.
"""

from __future__ import annotations

from xml.etree import ElementTree

from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import QemuProcess

from ..disks import image_labels
from ..libvirt import lock_manager
from ..process.apparmor_profile import ProfileCopy
from . import fixed_taps

_INTERFACES = "devices/interface"
#: Where it is in the XML, and what cannot be carried.
_ELEMENTS = (
    ("devices/tpm", "its TPM exits with the old QEMU"),
    ("devices/graphics[@type='spice']", "a SPICE display has a state of its own"),
    ("devices/video/model[@type='qxl']", "a QXL device has a state that a SPICE server has"),
    ("devices/redirdev", "a redirected USB device has a server"),
    ("devices/smartcard", "a smartcard has a server"),
    ("devices/hostdev", "a host device cannot be shared"),
    ("devices/filesystem", "the server of a file system exits with the old QEMU"),
    ("devices/shmem", "shared memory has a server"),
    ("devices/vsock", "a vsock cannot be shared"),
    ("devices/memory", "plugged memory is not supported"),
    ("devices/rng/backend[@model='egd']", "a source of entropy has a server"),
    ("devices/disk/source/reservations", "a reservation's helper exits with the old QEMU"),
    ("devices/disk/transient", "libvirt discards a transient disk's changes when the old QEMU exits"),
    ("devices/lease", "libvirt gives up a lease when the old QEMU exits"),
    (f"{_INTERFACES}[@type='direct']", "libvirt deletes a macvtap device when the old QEMU exits"),
    (f"{_INTERFACES}[@type='hostdev']", "a host device cannot be shared"),
    (f"{_INTERFACES}[@type='vdpa']", "a host device cannot be shared"),
    (f"{_INTERFACES}[@type='vhostuser']", "a vhost-user network card has a server"),
    (f"{_INTERFACES}/source[@mode]", "libvirt deletes a macvtap device when the old QEMU exits"),
    (f"{_INTERFACES}/source[@portgroup]", "a port group may have limits that libvirt removes with the old QEMU"),
    (f"{_INTERFACES}/virtualport", "libvirt deletes the port of the switch when the old QEMU exits"),
    (f"{_INTERFACES}/filterref", "libvirt removes its network filter with the old QEMU"),
    (f"{_INTERFACES}/bandwidth", "libvirt removes the limits of its bandwidth with the old QEMU"),
    (f"{_INTERFACES}/script", "the script of a network card may shut it down with the old QEMU"),
    (f"{_INTERFACES}/downscript", "the script of a network card shuts it down with the old QEMU"),
    (f"{_INTERFACES}/backend[@type='passt']", "the passt of a network card exits with the old QEMU"),
)


def blocker(xml: str, process: QemuProcess) -> str:
    """
    Why a transit cannot carry a domain, in a few words; empty if nothing is known.

    :param xml: of the domain as it runs.
    :raises ProcessError: its QEMU has exited.
    """
    domain = ElementTree.fromstring(xml)
    for path, reason in _ELEMENTS:
        if domain.find(path) is not None:
            return reason
    try:
        ProfileCopy.of(process.confinement)
    except SevhopError as err:
        return err.message
    if reason := image_labels.unusable(process):
        return reason
    if lock_manager.in_use():
        return "libvirt gives up the leases of its disks when the old QEMU exits"
    return fixed_taps.blocker(xml, process)
