"""A guest's machine: a short description, and the QEMU command line that it stands for."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Accelerator = Literal["kvm", "tcg"]

#: Machine types that every QEMU in :mod:`.emulators` has.
Q35 = "pc-q35-7.2"
I440FX = "pc-i440fx-7.2"

#: Where Debian's ovmf package puts the UEFI firmware, and the variables that a machine starts with.
OVMF_CODE = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
OVMF_VARIABLES = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")

#: What QEMU must be given of the processor's encryption, and compares with CPUID: that of the SEV lab's.
C_BIT = 47
_REDUCED_PHYS_BITS = 1

#: What a virtio device of an encrypted guest needs: it reaches only the memory that the guest lends it.
_LENT_MEMORY = ",iommu_platform=on,disable-legacy=on"

#: Devices with state of their own beyond what every guest has.
_RICH_DEVICES = (
    "VGA",
    "qemu-xhci,id=usb",
    "usb-tablet,bus=usb.0",
    "virtio-rng-pci",
    "virtio-scsi-pci,id=scsi",
    "virtio-serial-pci",
    "virtio-balloon-pci",
    "intel-hda",
)


@dataclass(frozen=True)
class Machine:
    """
    What a guest runs on. Every file of it is in one private directory, so that two guests never share anything.

    :ivar directory: for its sockets, logs and images.
    :ivar type: a versioned machine type.
    :ivar memory: ``shared`` (memfd, what a hop needs), or ``private`` (QEMU's default).
    :ivar bios: a firmware image of its own, instead of SeaBIOS.
    :ivar uefi: start with OVMF, on a private copy of its variables. With :attr:`bios` that is in OVMF's place: from
        flash, with variables.
    :ivar uefi_template: the variables that it starts with, those of its firmware.
    :ivar sev_policy: encrypted by SEV, under this policy; None for a plain guest.
    :ivar kernel: with its initial file system and command line, booted by the firmware.
    :ivar disk_mib: size of a qcow2 disk on virtio-blk; 0 for none.
    :ivar network: virtio-net, with QEMU's user network.
    :ivar rich: many more devices.
    :ivar more: further words of the command line.
    """

    directory: Path
    type: str = Q35
    accelerator: Accelerator = "tcg"
    cpu: str = "qemu64"
    cpus: int = 1
    memory_mib: int = 64
    memory: Literal["shared", "private"] = "shared"
    bios: Path | None = None
    uefi: bool = False
    uefi_template: Path = OVMF_VARIABLES
    sev_policy: int | None = None
    kernel: Path | None = None
    initrd: Path | None = None
    kernel_arguments: str = ""
    disk_mib: int = 0
    network: bool = False
    rich: bool = False
    more: tuple[str, ...] = ()

    @property
    def monitor(self) -> Path:
        """The QMP monitor's socket."""
        return self.directory / "qmp.sock"

    @property
    def serial(self) -> Path:
        """What the guest wrote to its first serial port."""
        return self.directory / "serial.log"

    @property
    def messages(self) -> Path:
        """What QEMU wrote to its stderr."""
        return self.directory / "qemu.log"

    @property
    def disk(self) -> Path:
        """The image of its disk."""
        return self.directory / "disk.qcow2"

    @property
    def uefi_variables(self) -> Path:
        """Its UEFI variables."""
        return self.directory / "uefi-variables.fd"

    def make_files(self) -> None:
        """Make the images that it starts with, unless they exist."""
        if self.disk_mib and not self.disk.exists():
            size = f"{self.disk_mib}M"
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", self.disk, size], check=True)
        if self.uefi and not self.uefi_variables.exists():
            shutil.copyfile(self.uefi_template, self.uefi_variables)

    def arguments(self) -> list[str]:
        """QEMU's arguments, without the emulator itself."""
        machine = f"{self.type},accel={self.accelerator}"
        words = ["-name", f"guest={self.directory.name}", "-nodefaults", "-no-user-config", "-display", "none"]
        if self.memory == "shared":
            words += ["-object", f"memory-backend-memfd,id=memory,size={self.memory_mib}M,share=on"]
            machine += ",memory-backend=memory"
        virtio = ""
        if self.sev_policy is not None:
            sev = f"cbitpos={C_BIT},reduced-phys-bits={_REDUCED_PHYS_BITS},policy={self.sev_policy}"
            words += ["-object", f"sev-guest,id=sev,{sev}"]
            machine += ",confidential-guest-support=sev"
            virtio = _LENT_MEMORY
        words += ["-machine", machine, "-cpu", self.cpu, "-smp", str(self.cpus), "-m", f"{self.memory_mib}M"]
        words += ["-qmp", f"unix:{self.monitor},server=on,wait=off"]
        words += ["-chardev", f"file,id=serial,path={self.serial},append=on", "-serial", "chardev:serial"]
        if self.bios and not self.uefi:
            words += ["-bios", str(self.bios)]
        if self.uefi:
            words += ["-blockdev", f"driver=file,node-name=uefi-code,filename={self.bios or OVMF_CODE},read-only=on"]
            words += ["-blockdev", f"driver=file,node-name=uefi-variables,filename={self.uefi_variables}"]
            words += ["-machine", "pflash0=uefi-code,pflash1=uefi-variables"]
        if self.kernel:
            words += ["-kernel", str(self.kernel), "-append", self.kernel_arguments]
        if self.initrd:
            words += ["-initrd", str(self.initrd)]
        if self.disk_mib:
            words += ["-blockdev", f"driver=file,node-name=disk-file,filename={self.disk}"]
            words += ["-blockdev", "driver=qcow2,node-name=disk,file=disk-file"]
            words += ["-device", f"virtio-blk-pci,drive=disk{virtio}"]
        if self.network:
            words += ["-netdev", "user,id=network,restrict=on"]
            words += ["-device", f"virtio-net-pci,netdev=network{virtio}"]
        for device in _RICH_DEVICES if self.rich else ():
            words += ["-device", device]
        return [*words, *self.more]

    def command(self, emulator: Path) -> list[str]:
        """The whole command line."""
        return [str(emulator), *self.arguments()]
