"""Taps whose names the administrator has chosen."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sevhop.engine import fixed_taps
from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import Descriptor

_libc = ctypes.CDLL(None, use_errno=True)
CARD = "<interface type='ethernet'><target dev='{}'/></interface>"


class Qemu:
    """The part of a process that is looked at: it has these taps open."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers

    def descriptors(self) -> list[Descriptor]:
        return [Descriptor(number, "/dev/net/tun") for number in self.numbers]

    def descriptor_info(self, number: int) -> dict[str, str]:
        lines = Path(f"/proc/thread-self/fdinfo/{number}").read_text().splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def domain(*cards: str) -> str:
    return f"<domain><devices>{''.join(cards)}</devices></domain>"


@pytest.fixture
def elsewhere() -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Calls functions in a network namespace of their own."""
    with ThreadPoolExecutor(max_workers=1) as thread:  # a namespace belongs to a thread
        if thread.submit(_libc.unshare, 0x40000000).result():  # CLONE_NEWNET
            pytest.skip("no network namespace can be made here")
        yield lambda function: thread.submit(function).result()


def tap(name: str) -> int:
    """It is up. Open as long as the test lasts."""
    try:
        number = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        fcntl.ioctl(number, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x1002))  # TUNSETIFF
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            fcntl.ioctl(control, 0x8914, struct.pack("16sH22x", name.encode(), 0x1))  # SIOCSIFFLAGS
    except OSError as err:
        pytest.skip(f"no tap can be made here: {err.strerror}")
    return number


def flags(name: str) -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        answer = fcntl.ioctl(control, 0x8913, struct.pack("16sH22x", name.encode(), 0))
    return int(struct.unpack("16sH22x", answer)[1])


@pytest.mark.parametrize("kernel", ["of today", "before 6.2"])
def test_tap_is_renamed_and_stays_up(
    elsewhere: Callable[[Callable[[], Any]], Any], monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    set_name = fixed_taps._set_name

    def only_while_down(control: socket.socket, name: str) -> None:
        if flags(name) & 1:
            raise OSError(errno.EBUSY, "busy")
        set_name(control, name)

    if kernel == "before 6.2":
        monkeypatch.setattr(fixed_taps, "_set_name", only_while_down)

    def see() -> None:
        qemu: Any = Qemu(tap("web0"), tap("vnet7"))
        xml = domain(CARD.format("web0"), CARD.format("vnet7"), CARD.format("of-another"))
        try:
            assert fixed_taps.rename(xml, qemu) == {"web0": "sevhop0"}
            assert flags("sevhop0") & 1
            assert flags("vnet7") & 1
            assert fixed_taps.rename(xml, qemu) == {}  # nothing is left to do
        finally:
            for number in qemu.numbers:
                os.close(number)

    elsewhere(see)


def test_tap_that_cannot_be_renamed_is_reported(
    elsewhere: Callable[[Callable[[], Any]], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(control: socket.socket, name: str) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(fixed_taps, "_set_name", refuse)

    def see() -> None:
        qemu: Any = Qemu(tap("web0"))
        try:
            with pytest.raises(SevhopError, match="cannot rename the tap web0: Cannot allocate memory"):
                fixed_taps.rename(domain(CARD.format("web0")), qemu)
        finally:
            os.close(qemu.numbers[0])

    elsewhere(see)


def test_blocker_names_the_tap(elsewhere: Callable[[Callable[[], Any]], Any]) -> None:
    nothing: Any = Qemu()
    assert fixed_taps.blocker(domain("<interface type='user'/>", CARD.format("vnet0")), nothing) == ""
    managed = CARD.replace("/></", " managed='no'/></")
    assert "web0 is not libvirt's own" in fixed_taps.blocker(domain(managed.format("web0")), nothing)
    assert "web0 is not a tap that its QEMU has open" in fixed_taps.blocker(domain(CARD.format("web0")), nothing)

    def see() -> int:
        qemu: Any = Qemu(tap("web0"))
        assert fixed_taps.blocker(domain(CARD.format("web0")), qemu) == ""
        return int(qemu.numbers[0])

    number = elsewhere(see)
    try:
        qemu: Any = Qemu(number)
        assert "in another network namespace" in fixed_taps.blocker(domain(CARD.format("web0")), qemu)
    finally:
        os.close(number)
