"""
The Linux guest: Debian's kernel as it is, and one program, ``linux_init.c``; what it does is described there.

The kernel is that of the machine's own Debian suite, downloaded and unpacked, not installed. The initial file system
is made here: the program, and the drivers that it needs.
"""

from __future__ import annotations

import lzma
import platform
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path

from . import build, emulators
from .machine import Machine

_HERE = Path(__file__)
_INIT_SOURCE = _HERE.with_name("linux_init.c")

#: Drivers for what the guest uses; those that they need come with them.
_DRIVERS = ("virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "i6300esb", "efivarfs", "button")

#: What is kept of a kernel's package, see _fetch_kernel. A change there needs a new value here, and another download.
_KEPT = "vmlinuz, vmlinux, drivers"

#: The command line of the kernel.
KERNEL_ARGUMENTS = "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check"
#: What the guest's kernel reports since all is slow in emulation: an interrupt took long; its clock was checked late,
#: since a new QEMU that starts takes the emulated processors from the guest.
SLOW = ("hrtimer: interrupt took ", "clocksource: Long readout interval, skipping watchdog check")

#: The least memory of a SEV guest in MiB: what its devices reach takes 64.
SEV_MEMORY_MIB = 384

#: After so many ticks the guest has checked all of its memory (MEMORY and CHUNK in linux_init.c).
MEMORY_TICKS = 64

#: Whom the guest expects to answer, and its own address (linux_init.c).
GATEWAY, ADDRESS = "10.0.2.2", "10.0.2.15"

#: The UEFI variable that the guest sets, as UEFI writes names.
_VARIABLE_NAME = "SevhopTick".encode("utf-16-le")


@dataclass(frozen=True)
class LinuxImages:
    """
    What the guest boots.

    :ivar kernel: as Debian ships it, compressed.
    :ivar unpacked: the kernel inside; under emulation the guest decompresses longer than it boots.
    """

    kernel: Path
    unpacked: Path
    initrd: Path


def images() -> LinuxImages:
    """
    The kernel and initial file system, made if need be; the first call downloads some 70 MB.

    :raises build.Unavailable: the kernel cannot be had, or there is no C compiler.
    """
    suite = platform.freedesktop_os_release().get("VERSION_CODENAME", "sid")
    kernel = build.built(f"kernel-{suite}", [*_DRIVERS, _KEPT], lambda path: _fetch_kernel(path, suite))
    init = build.built("linux-init", [_INIT_SOURCE], _compile)
    drivers = sorted(kernel.glob("*.ko"))
    initrd = build.built("initrd.cpio", [init, *drivers, _HERE], lambda path: _write_initrd(path, init, drivers))
    return LinuxImages(kernel / "vmlinuz", kernel / "vmlinux", initrd)


def on(machine: Machine) -> Machine:
    """
    The same machine with Linux on it, and the devices that the guest uses; a SEV guest is started by UEFI.

    :raises build.Unavailable: the kernel or the firmware cannot be had, or there is no C compiler.
    """
    linux = images()
    if machine.sev_policy is not None:
        code, variables = sev_firmware()
        machine = replace(
            machine,
            uefi=True,
            bios=code,
            uefi_template=variables,
            memory_mib=max(machine.memory_mib, SEV_MEMORY_MIB),
        )
    return replace(
        machine,
        kernel=linux.kernel if machine.uefi else linux.unpacked,  # UEFI starts programs, which the inner one is not
        initrd=linux.initrd,
        kernel_arguments=KERNEL_ARGUMENTS,
        memory_mib=max(machine.memory_mib, 256),
        disk_mib=machine.disk_mib or 16,
        network=True,
    )


def sev_firmware() -> tuple[Path, Path]:
    """
    OVMF for a SEV guest: its code, and the variables to start with.

    It is that of Debian 13: that of Debian 12 begins with 32-bit code, which knows no encryption.

    :raises build.Unavailable: it cannot be had.
    """
    return emulators.uefi(emulators.NEW)


def uefi_variable(variables: Path) -> int | None:
    """
    The value of the guest's UEFI variable in a file of UEFI variables; None if it is not there.

    The file may be in use: QEMU writes through.
    """
    store = variables.read_bytes()
    value = None
    # AUTHENTICATED_VARIABLE_HEADER of EDK II, packed; the name and the data follow it.
    header = struct.Struct("<HBxIQ16sIII16s")
    for found in re.finditer(b"\xaa\x55\x3f", store):  # 0x55aa, and the state of a variable that is in force
        *_, name_size, data_size, _ = header.unpack_from(store, found.start())
        name = found.start() + header.size
        if store[name : name + name_size].rstrip(b"\0") == _VARIABLE_NAME.rstrip(b"\0") and data_size == 8:
            (value,) = struct.unpack_from("<Q", store, name + name_size)
    return value


def _fetch_kernel(directory: Path, suite: str) -> None:
    """Of the kernel's package, what is needed: ``vmlinuz``, and the drivers in the order in which to load them."""
    unpacked = directory.with_name("unpacked")
    only = "linux-image-[0-9].*"  # not the metapackage's other dependencies
    build.fetch([build.ROOT / "tools" / "fetch-packages", "--only", only, suite, unpacked, "linux-image-amd64"])
    directory.mkdir()
    (image,) = unpacked.glob("boot/vmlinuz-*")
    image.rename(directory / "vmlinuz")
    _decompress(directory / "vmlinuz", directory / "vmlinux")
    for order, driver in enumerate(_in_order(unpacked)):
        (directory / f"{order:02}.ko").write_bytes(driver)


def _decompress(kernel: Path, inside: Path) -> None:
    """
    Write the ELF file that a compressed kernel has in it.

    The fields are those of Documentation/arch/x86/boot.rst; bookworm's kernel is compressed by xz, trixie's by zstd.
    """
    image = kernel.read_bytes()
    setup_sectors = image[0x1F1]
    payload_offset, payload_length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * 512 + payload_offset
    payload = image[start : start + payload_length - 4]  # without the decompressed size
    if payload.startswith(b"\xfd7zXZ"):
        inside.write_bytes(lzma.decompress(payload))
    elif payload.startswith(b"\x28\xb5\x2f\xfd"):
        compressed = inside.with_suffix(".zst")
        compressed.write_bytes(payload)
        build.run(["zstd", "--quiet", "--decompress", "--rm", "-o", inside, compressed])
    else:
        raise build.BuildFailed(f"{kernel.name} is compressed in an unknown way ({payload[:4].hex()})")


def _in_order(unpacked: Path) -> list[bytes]:
    """The drivers as the kernel loads them, each after those that it needs. What is built in has no file."""
    files = {
        path.name.split(".")[0].replace("-", "_"): path
        for where in ("lib", "usr/lib")  # before and after Debian merged the two
        for path in (unpacked / where / "modules").rglob("*.ko*")
    }
    ordered: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in ordered or name not in files:
            return
        content = files[name].read_bytes()
        if files[name].suffix == ".xz":
            content = lzma.decompress(content)
        needs = re.search(rb"\0depends=([^\0]*)\0", content)
        for needed in needs[1].decode("ascii").split(",") if needs else ():
            add(needed.replace("-", "_"))
        ordered[name] = content

    for name in _DRIVERS:
        add(name)
    return list(ordered.values())


def _compile(program: Path) -> None:
    build.run(["gcc", "-static", "-O2", "-Wall", "-Wextra", "-Werror", "-o", program, _INIT_SOURCE])


def _write_initrd(initrd: Path, init: Path, drivers: list[Path]) -> None:
    """An archive in the format of the kernel's initramfs (cpio "newc"); not compressed, QEMU copies it fast enough."""
    with open(initrd, "wb") as archive:
        number = 0

        def add(name: str, mode: int, content: bytes = b"") -> None:
            nonlocal number
            number += 1
            encoded = name.encode("ascii") + b"\0"
            fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
            entry = b"070701" + b"".join(b"%08x" % value for value in fields) + encoded
            archive.write(entry + bytes(-len(entry) % 4) + content + bytes(-len(content) % 4))

        add("init", 0o100755, init.read_bytes())
        add("modules", 0o040755)
        for driver in drivers:
            add(f"modules/{driver.name}", 0o100644, driver.read_bytes())
        add("TRAILER!!!", 0)
