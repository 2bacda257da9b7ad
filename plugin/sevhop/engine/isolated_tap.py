"""
Tap devices in an otherwise empty network namespace: to a QEMU they look like any other, and lead nowhere.

Such a device lasts as long as its descriptors; the namespace goes with it. See Documentation/networking/tuntap.rst.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from concurrent.futures import ThreadPoolExecutor

from sevhop_qmp.errors import SevhopError

_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI, _IFF_MULTI_QUEUE, _IFF_VNET_HDR = 0x0002, 0x1000, 0x0100, 0x4000
_libc = ctypes.CDLL(None, use_errno=True)


def open_tap(queues: int) -> list[int]:
    """
    A tap device, as one descriptor for each queue.

    :raises SevhopError: the host does not have such devices, or does not let us.
    """
    # A namespace belongs to a thread: this one exits when it has opened the device.
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(_open, queues).result()


def _open(queues: int) -> list[int]:
    descriptors: list[int] = []
    try:
        if _libc.unshare(_CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | (_IFF_MULTI_QUEUE if queues > 1 else 0)
        for _ in range(queues):
            # Blocking: a non-blocking one is taken for the source's (qmp_ext/adopt/taps.c), and not set up.
            descriptors.append(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
            fcntl.ioctl(descriptors[-1], _TUNSETIFF, struct.pack("16sH22x", b"rehearsal", flags))
    except OSError as err:
        for descriptor in descriptors:
            os.close(descriptor)
        hint = "load the kernel module tun, or skip the rehearsal: sevhop upgrade --no-rehearsal"
        raise SevhopError(f"cannot create a tap device for the rehearsal: {err.strerror}", hint) from err
    return descriptors
