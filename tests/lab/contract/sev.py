"""SEV guests: launched as QEMU launches them, and what the firmware of the security processor knows of them."""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import kvm
from .kvm import Memory, Vm

# Increments a counter in memory and writes it to a port, for ever: each output is one more than the last.
COUNT = bytes.fromhex(
    "66ff060090"  # incl 0x9000
    "66a10090"  # movl 0x9000, %eax
    "66e7e9"  # outl %eax, $0xe9
    "ebf2"  # jmp to the start
)
# Increments the counter and never leaves the guest.
SPIN = bytes.fromhex(
    "66ff060090"  # incl 0x9000
    "ebf9"  # jmp to the start
)
PROGRAM = 0x8000
COUNTER = 0x9000

# State of a guest, as the firmware numbers them.
RUNNING = 3

POLICY_SEV = 0
POLICY_SEV_ES = 4


@dataclass(frozen=True)
class Context:
    """A guest as the firmware sees it.

    :ivar tik: the key for the integrity of what firmware and owner exchange, and `tek` for its encryption.
    """

    handle: int
    asid: int
    policy: int
    state: int
    bytes: int
    vmsas: int
    tik: int
    tek: int


def contexts() -> list[Context]:
    """All guests that the firmware knows."""
    return [Context(**fields) for kind, fields in account() if kind == "guest"]


def account() -> list[tuple[str, dict[str, int]]]:
    """What the security processor of the lab knows: lines that begin with "platform" or "guest", and their fields.

    Its ports are described in tools/lab/processor/qemu/psp.c.
    """
    text = b""
    with _ports() as ports:
        os.pwrite(ports, bytes(4), 0)
        while not text.endswith(b"\0"):
            text += os.pread(ports, 4, 4)
    lines = text.rstrip(b"\0").decode().splitlines()
    return [
        (kind, {name: int(value, 0) for name, value in map(_pair, words)})
        for kind, *words in (line.split() for line in lines)
    ]


def execute(command: int) -> int:
    """Have the firmware execute a command that has no buffer, at the driver's back. The firmware's status."""
    with _ports() as ports:
        os.pwrite(ports, command.to_bytes(4, "little"), 8)
        return int.from_bytes(os.pread(ports, 4, 8), "little")


@contextmanager
def _ports() -> Iterator[int]:
    """The ports of the security processor, for this process alone."""
    descriptor = os.open(_security_processor() / "resource4", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _security_processor() -> Path:
    for device in Path("/sys/bus/pci/devices").iterdir():
        identity = [(device / name).read_text().strip() for name in ("vendor", "device")]
        if identity == ["0x1022", "0x1456"]:
            return device
    raise LookupError("the machine has no security processor whose account can be read")


def _pair(word: str) -> tuple[str, str]:
    name, _, value = word.partition("=")
    return name, value


class SevVm(Vm):
    """
    An SEV guest that has been launched and is ready to run PROGRAM; see `launch`.

    :ivar es: whether its registers are encrypted, too (SEV-ES).
    :ivar device: /dev/sev.
    """

    def __init__(
        self, *, es: bool = False, type: int = kvm.KVM_X86_DEFAULT_VM, memory: Memory | None = None, vcpus: int = 1
    ) -> None:
        super().__init__(type=type, memory=memory, vcpus=0)
        self.es = es
        self.device = os.open("/dev/sev", os.O_RDWR | os.O_CLOEXEC)
        if type == kvm.KVM_X86_DEFAULT_VM:
            self.sev(kvm.KVM_SEV_ES_INIT if es else kvm.KVM_SEV_INIT)
        else:
            self.sev(kvm.KVM_SEV_INIT2, kvm.kvm_sev_init())
        for _ in range(vcpus):
            self.add_vcpu()
        self.register_region(self.memory)

    @classmethod
    def launched(
        cls,
        *,
        es: bool = False,
        type: int = kvm.KVM_X86_DEFAULT_VM,
        memory: Memory | None = None,
        vcpus: int = 1,
        program: bytes = COUNT,
        vmsa: bool = True,
        pages: int = 1,
    ) -> SevVm:
        """
        All of the launch.

        :param vmsa: for SEV-ES: encrypt the registers, as QEMU does when the machine is complete.
        :param pages: how many are encrypted, from PROGRAM on.
        """
        vm = cls(es=es, type=type, memory=memory, vcpus=vcpus)
        vm.memory.map[PROGRAM : PROGRAM + len(program)] = program
        for vcpu in vm.vcpus:
            vcpu.start_at(PROGRAM)
        vm.sev(kvm.KVM_SEV_LAUNCH_START, kvm.kvm_sev_launch_start(policy=POLICY_SEV_ES if es else POLICY_SEV))
        data = kvm.kvm_sev_launch_update_data(uaddr=vm.memory.address + PROGRAM, len=0x1000 * pages)
        vm.sev(kvm.KVM_SEV_LAUNCH_UPDATE_DATA, data)
        if es and vmsa:
            vm.sev(kvm.KVM_SEV_LAUNCH_UPDATE_VMSA)
        measurement = ctypes.create_string_buffer(48)
        vm.sev(
            kvm.KVM_SEV_LAUNCH_MEASURE,
            kvm.kvm_sev_launch_measure(uaddr=ctypes.addressof(measurement), len=len(measurement)),
        )
        vm.sev(kvm.KVM_SEV_LAUNCH_FINISH)
        return vm

    def sev(self, number: int, argument: ctypes.Structure | None = None) -> None:
        kvm.command(self.descriptor, self.device, number, argument)

    def close(self) -> None:
        if not self.closed:
            os.close(self.device)
        super().close()


def guest_status(vm: Vm) -> kvm.kvm_sev_guest_status:
    """KVM_SEV_GUEST_STATUS: what QEMU's query-sev is made of."""
    status = kvm.kvm_sev_guest_status()
    device = os.open("/dev/sev", os.O_RDWR | os.O_CLOEXEC)
    try:
        kvm.command(vm.descriptor, device, kvm.KVM_SEV_GUEST_STATUS, status)
    finally:
        os.close(device)
    return status
