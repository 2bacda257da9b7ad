"""Taps that the source uses while the destination starts: nothing of them changes before the guest runs there."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.guests.machine import Accelerator

from .adopting import EVERY_EMULATOR, Destination, Keeper, Memory, machine

# include/uapi/linux/if_tun.h
TUNSETIFF = 0x400454CA
TUNGETIFF = 0x800454D2
TUNSETOFFLOAD = 0x400454D0
TUNGETVNETHDRSZ, TUNSETVNETHDRSZ = 0x800454D7, 0x400454D8
TUNSETQUEUE = 0x400454D9
IFF_TAP, IFF_MULTI_QUEUE, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x0100, 0x1000, 0x4000
IFF_DETACH_QUEUE = 0x0400
F_CSUM, F_TSO4 = 0x01, 0x02
# include/uapi/linux/sockios.h, ethtool.h
SIOCETHTOOL = 0x8946
ETHTOOL_GTXCSUM, ETHTOOL_GTSO = 0x16, 0x1E

#: struct virtio_net_hdr, and with the number of buffers, which drivers use.
SHORT, LONG = 10, 12


class Tap:
    """A tap that a guest uses: with the header and the offloads of a usual driver."""

    def __init__(self, queues: int = 1, *, used: bool = True) -> None:
        self.fds: list[int] = []
        flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | (IFF_MULTI_QUEUE if queues > 1 else 0)
        self.name = b"sevhop%d"
        for _ in range(queues):
            # QEMU makes the descriptors that it uses non-blocking.
            self.fds.append(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | (os.O_NONBLOCK if used else 0)))
            asked = fcntl.ioctl(self.fds[-1], TUNSETIFF, struct.pack("16sH22x", self.name, flags))
            self.name = asked[:16].rstrip(b"\0")
        fcntl.ioctl(self.fds[0], TUNSETVNETHDRSZ, struct.pack("i", LONG))
        fcntl.ioctl(self.fds[0], TUNSETOFFLOAD, F_CSUM | F_TSO4)

    def detach(self, queue: int) -> None:
        fcntl.ioctl(self.fds[queue], TUNSETQUEUE, struct.pack("16sH22x", b"", IFF_DETACH_QUEUE))

    def attached(self, queue: int) -> bool:
        _, flags = struct.unpack("16sH22x", fcntl.ioctl(self.fds[queue], TUNGETIFF, bytes(40)))
        return not flags & IFF_DETACH_QUEUE

    def settings(self) -> tuple[int, bool, bool]:
        """Length of the header, and whether checksums and segmentation are left to the guest."""
        (length,) = struct.unpack("i", fcntl.ioctl(self.fds[0], TUNGETVNETHDRSZ, bytes(4)))
        return length, self._feature(ETHTOOL_GTXCSUM), self._feature(ETHTOOL_GTSO)

    def _feature(self, command: int) -> bool:
        value = (ctypes.c_uint32 * 2)(command, 0)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            request = struct.pack("16sP16x", self.name, ctypes.addressof(value))
            fcntl.ioctl(any_socket.fileno(), SIOCETHTOOL, request)
        return bool(value[1])

    def card(self) -> list[str]:
        """The options of a card on it."""
        many = len(self.fds) > 1
        numbers = ":".join(map(str, self.fds))
        return [
            *["-netdev", f"tap,id=net0,{'fds' if many else 'fd'}={numbers},vhost=off"],
            *["-device", f"virtio-net-pci,netdev=net0,romfile=,mq={'on' if many else 'off'}"],
        ]


USED = (LONG, True, True)
#: As QEMU sets a tap up for a guest without a driver.
UNUSED = (SHORT, False, False)


@contextlib.contextmanager
def opened(queues: int = 1, *, used: bool = True) -> Iterator[Tap]:
    try:
        tap = Tap(queues, used=used)
    except OSError as err:
        pytest.skip(f"no tap can be made here: {err.strerror}")
    try:
        yield tap
    finally:
        for fd in tap.fds:
            os.close(fd)


@EVERY_EMULATOR
def test_tap_is_non_blocking_once_a_qemu_uses_it(qemu: Path, accelerator: Accelerator) -> None:
    """By this the destination recognizes it."""
    with opened(used=False) as tap:
        assert not fcntl.fcntl(tap.fds[0], fcntl.F_GETFL) & os.O_NONBLOCK
        with Destination([qemu, *machine(accelerator, *tap.card(), incoming=False)], dict(os.environ), tap.fds):
            assert fcntl.fcntl(tap.fds[0], fcntl.F_GETFL) & os.O_NONBLOCK


@EVERY_EMULATOR
def test_tap_of_the_source_is_set_up_when_the_guest_runs(qemu: Path, accelerator: Accelerator, keeper: Keeper) -> None:
    with opened() as tap:
        assert tap.settings() == USED
        command = machine(accelerator, *tap.card(), incoming=False)
        with Destination.adopting(qemu, command, keeper, keep=tap.fds) as destination:
            assert tap.settings() == USED
            assert destination.status().deferred_tap_settings >= 2
            destination.adopt_ram()
            destination.execute("system_reset")
            assert tap.settings() == USED
            destination.execute("cont")
            assert tap.settings() == UNUSED
            assert destination.status().deferred_tap_settings == 0


@EVERY_EMULATOR
def test_tap_of_the_source_is_as_it_was_after_a_rollback(qemu: Path, accelerator: Accelerator, keeper: Keeper) -> None:
    with opened() as tap:
        with Destination.adopting(qemu, machine(accelerator, *tap.card()), keeper, keep=tap.fds) as destination:
            destination.adopt_ram()
        assert tap.settings() == USED


@EVERY_EMULATOR
def test_tap_of_the_source_is_set_up_at_the_end_of_the_hop_of_a_paused_guest(
    qemu: Path, accelerator: Accelerator, keeper: Keeper
) -> None:
    with opened() as tap:
        command = machine(accelerator, *tap.card())
        with Destination.adopting(qemu, command, keeper, keep=tap.fds) as destination:
            destination.adopt_ram()
            assert tap.settings() == USED
            destination.finish()
            assert tap.settings() == UNUSED


@EVERY_EMULATOR
@pytest.mark.parametrize("source", ["running", "ended"])
def test_tap_of_the_destination_is_set_up_at_once(
    qemu: Path, accelerator: Accelerator, memory: Memory, source: str
) -> None:
    """One that was made for it, and one that the source does not use any more."""
    with opened(used=source == "ended") as tap, Keeper([memory], source=source) as keeper:
        command = machine(accelerator, *tap.card())
        with Destination.adopting(qemu, command, keeper, keep=tap.fds) as destination:
            assert tap.settings() == UNUSED
            assert destination.status().deferred_tap_settings == 0


@EVERY_EMULATOR
def test_queues_of_the_source_stay_attached_until_the_guest_runs(
    qemu: Path, accelerator: Accelerator, keeper: Keeper
) -> None:
    with opened(queues=2) as tap:
        command = machine(accelerator, *tap.card(), "-smp", "2", incoming=False)
        with Destination.adopting(qemu, command, keeper, keep=tap.fds) as destination:
            assert (tap.attached(0), tap.attached(1)) == (True, True)
            destination.adopt_ram()
            destination.execute("cont")
            # A guest without a driver uses one.
            assert (tap.attached(0), tap.attached(1)) == (True, False)
            assert tap.settings() == UNUSED


@EVERY_EMULATOR
def test_queue_that_the_guest_does_not_use_is_accepted(qemu: Path, accelerator: Accelerator, keeper: Keeper) -> None:
    with opened(queues=2) as tap:
        tap.detach(1)
        command = machine(accelerator, *tap.card(), "-smp", "2", incoming=False)
        with Destination.adopting(qemu, command, keeper, keep=tap.fds) as destination:
            assert tap.settings() == USED
            destination.adopt_ram()
            destination.execute("cont")
            assert (tap.attached(0), tap.attached(1)) == (True, False)
            assert tap.settings() == UNUSED
            destination.execute("quit")
            assert destination.exited() == (0, [])
