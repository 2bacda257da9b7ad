"""
What the tests use of <linux/kvm.h>, under the names that it has there, and thin objects over it.

Every call that the kernel refuses raises OSError; `outcome` turns that into a word.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Callable
from types import TracebackType
from typing import Any, ClassVar, Self

_NONE, _WRITE, _READ = 0, 1, 2
_KVMIO = 0xAE


def _request(direction: int, number: int, size: int = 0) -> int:
    return direction << 30 | size << 16 | _KVMIO << 8 | number


class kvm_userspace_memory_region(ctypes.Structure):
    _fields_: ClassVar = [
        ("slot", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("guest_phys_addr", ctypes.c_uint64),
        ("memory_size", ctypes.c_uint64),
        ("userspace_addr", ctypes.c_uint64),
    ]


class kvm_regs(ctypes.Structure):
    _fields_: ClassVar = [
        (name, ctypes.c_uint64)
        for name in "rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags".split()
    ]


class kvm_segment(ctypes.Structure):
    _fields_: ClassVar = [
        ("base", ctypes.c_uint64),
        ("limit", ctypes.c_uint32),
        ("selector", ctypes.c_uint16),
        *((name, ctypes.c_uint8) for name in "type present dpl db s l g avl unusable padding".split()),
    ]


class kvm_dtable(ctypes.Structure):
    _fields_: ClassVar = [
        ("base", ctypes.c_uint64),
        ("limit", ctypes.c_uint16),
        ("padding", ctypes.c_uint16 * 3),
    ]


class kvm_sregs(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, kvm_segment) for name in "cs ds es fs gs ss tr ldt".split()),
        *((name, kvm_dtable) for name in "gdt idt".split()),
        *((name, ctypes.c_uint64) for name in "cr0 cr2 cr3 cr4 cr8 efer apic_base".split()),
        ("interrupt_bitmap", ctypes.c_uint64 * 4),
    ]


class kvm_cpuid_entry2(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, ctypes.c_uint32) for name in "function index flags eax ebx ecx edx".split()),
        ("padding", ctypes.c_uint32 * 3),
    ]


class kvm_cpuid2(ctypes.Structure):
    """In the header the entries are no part of the structure, and do not count in the requests' numbers."""

    MOST: ClassVar = 256
    _fields_: ClassVar = [
        ("nent", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
        ("entries", kvm_cpuid_entry2 * MOST),
    ]


class kvm_enable_cap(ctypes.Structure):
    _fields_: ClassVar = [
        ("cap", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("args", ctypes.c_uint64 * 4),
        ("pad", ctypes.c_uint8 * 64),
    ]


class kvm_enc_region(ctypes.Structure):
    _fields_: ClassVar = [("addr", ctypes.c_uint64), ("size", ctypes.c_uint64)]


class kvm_sev_cmd(ctypes.Structure):
    _fields_: ClassVar = [
        ("id", ctypes.c_uint32),
        ("pad0", ctypes.c_uint32),
        ("data", ctypes.c_uint64),
        ("error", ctypes.c_uint32),
        ("sev_fd", ctypes.c_uint32),
    ]


class kvm_sev_init(ctypes.Structure):
    _fields_: ClassVar = [
        ("vmsa_features", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("ghcb_version", ctypes.c_uint16),
        ("pad1", ctypes.c_uint16),
        ("pad2", ctypes.c_uint32 * 8),
    ]


class kvm_sev_launch_start(ctypes.Structure):
    _fields_: ClassVar = [
        ("handle", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("dh_uaddr", ctypes.c_uint64),
        ("dh_len", ctypes.c_uint32),
        ("pad0", ctypes.c_uint32),
        ("session_uaddr", ctypes.c_uint64),
        ("session_len", ctypes.c_uint32),
        ("pad1", ctypes.c_uint32),
    ]


class kvm_sev_launch_update_data(ctypes.Structure):
    _fields_: ClassVar = [("uaddr", ctypes.c_uint64), ("len", ctypes.c_uint32), ("pad0", ctypes.c_uint32)]


class kvm_sev_launch_measure(ctypes.Structure):
    _fields_: ClassVar = [("uaddr", ctypes.c_uint64), ("len", ctypes.c_uint32), ("pad0", ctypes.c_uint32)]


class kvm_sev_launch_secret(ctypes.Structure):
    _fields_: ClassVar = [
        (name + suffix, kind)
        for name in ("hdr", "guest", "trans")
        for suffix, kind in (("_uaddr", ctypes.c_uint64), ("_len", ctypes.c_uint32), ("_pad", ctypes.c_uint32))
    ]


class kvm_sev_attestation_report(ctypes.Structure):
    _fields_: ClassVar = [
        ("mnonce", ctypes.c_uint8 * 16),
        ("uaddr", ctypes.c_uint64),
        ("len", ctypes.c_uint32),
        ("pad0", ctypes.c_uint32),
    ]


class kvm_sev_dbg(ctypes.Structure):
    _fields_: ClassVar = [
        ("src_uaddr", ctypes.c_uint64),
        ("dst_uaddr", ctypes.c_uint64),
        ("len", ctypes.c_uint32),
        ("pad0", ctypes.c_uint32),
    ]


class kvm_sev_guest_status(ctypes.Structure):
    _fields_: ClassVar = [("handle", ctypes.c_uint32), ("policy", ctypes.c_uint32), ("state", ctypes.c_uint32)]


class kvm_run(ctypes.Structure):
    """The first members, up to those of KVM_EXIT_IO."""

    _fields_: ClassVar = [
        ("request_interrupt_window", ctypes.c_uint8),
        ("immediate_exit", ctypes.c_uint8),
        ("padding1", ctypes.c_uint8 * 6),
        ("exit_reason", ctypes.c_uint32),
        ("ready_for_interrupt_injection", ctypes.c_uint8),
        ("if_flag", ctypes.c_uint8),
        ("flags", ctypes.c_uint16),
        ("cr8", ctypes.c_uint64),
        ("apic_base", ctypes.c_uint64),
        ("io_direction", ctypes.c_uint8),
        ("io_size", ctypes.c_uint8),
        ("io_port", ctypes.c_uint16),
        ("io_count", ctypes.c_uint32),
        ("io_data_offset", ctypes.c_uint64),
    ]


KVM_CREATE_VM = _request(_NONE, 0x01)
KVM_CHECK_EXTENSION = _request(_NONE, 0x03)
KVM_GET_VCPU_MMAP_SIZE = _request(_NONE, 0x04)
KVM_GET_SUPPORTED_CPUID = _request(_READ | _WRITE, 0x05, 8)
KVM_CREATE_VCPU = _request(_NONE, 0x41)
KVM_SET_USER_MEMORY_REGION = _request(_WRITE, 0x46, ctypes.sizeof(kvm_userspace_memory_region))
KVM_RUN = _request(_NONE, 0x80)
KVM_GET_REGS = _request(_READ, 0x81, ctypes.sizeof(kvm_regs))
KVM_SET_REGS = _request(_WRITE, 0x82, ctypes.sizeof(kvm_regs))
KVM_GET_SREGS = _request(_READ, 0x83, ctypes.sizeof(kvm_sregs))
KVM_SET_SREGS = _request(_WRITE, 0x84, ctypes.sizeof(kvm_sregs))
KVM_SET_CPUID2 = _request(_WRITE, 0x90, 8)
KVM_ENABLE_CAP = _request(_WRITE, 0xA3, ctypes.sizeof(kvm_enable_cap))
KVM_MEMORY_ENCRYPT_OP = _request(_READ | _WRITE, 0xBA, 8)
KVM_MEMORY_ENCRYPT_REG_REGION = _request(_READ, 0xBB, ctypes.sizeof(kvm_enc_region))
KVM_MEMORY_ENCRYPT_UNREG_REGION = _request(_READ, 0xBC, ctypes.sizeof(kvm_enc_region))

KVM_CAP_VM_COPY_ENC_CONTEXT_FROM = 197
KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM = 206
KVM_CAP_VM_TYPES = 235

KVM_EXIT_IO = 2

KVM_X86_DEFAULT_VM = 0
KVM_X86_SEV_VM = 2
KVM_X86_SEV_ES_VM = 3

KVM_SEV_INIT = 0
KVM_SEV_ES_INIT = 1
KVM_SEV_LAUNCH_START = 2
KVM_SEV_LAUNCH_UPDATE_DATA = 3
KVM_SEV_LAUNCH_UPDATE_VMSA = 4
KVM_SEV_LAUNCH_SECRET = 5
KVM_SEV_LAUNCH_MEASURE = 6
KVM_SEV_LAUNCH_FINISH = 7
KVM_SEV_GUEST_STATUS = 16
KVM_SEV_DBG_DECRYPT = 17
KVM_SEV_DBG_ENCRYPT = 18
KVM_SEV_GET_ATTESTATION_REPORT = 20
KVM_SEV_INIT2 = 22

OK = "OK"


def outcome(call: Callable[..., object], *arguments: object) -> str:
    """Make the call and return its result: ``OK`` or the name of its errno, such as ``EINVAL``."""
    try:
        call(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return OK


def _set(descriptor: int, request: int, argument: ctypes.Structure) -> None:
    """An ioctl with a structure, which the kernel may change."""
    fcntl.ioctl(descriptor, request, argument)


class Memory:
    """
    A guest's memory: what QEMU calls a shared memfd backend.

    :ivar file: may be given to another process, whose Memory then shows the same pages.
    """

    SIZE = 0x20000

    def __init__(self, file: int | None = None) -> None:
        if file is None:
            file = os.memfd_create("guest")
            os.ftruncate(file, self.SIZE)
        self.file = file
        self.map = mmap.mmap(file, self.SIZE)
        self._pinned: ctypes.Array[ctypes.c_char] | None = (ctypes.c_char * self.SIZE).from_buffer(self.map)
        self.address = ctypes.addressof(self._pinned)

    def word(self, address: int) -> int:
        return int.from_bytes(self.map[address : address + 4], "little")

    def again(self) -> Memory:
        """A second mapping of the same memory, for another VM."""
        return Memory(os.dup(self.file))

    def close(self) -> None:
        self._pinned = None
        self.map.close()
        os.close(self.file)


class Vcpu:
    """A vCPU in real mode; ``start_at`` makes it ready to run a program below 64 KiB."""

    def __init__(self, vm: Vm, number: int) -> None:
        self.descriptor = fcntl.ioctl(vm.descriptor, KVM_CREATE_VCPU, number)
        size = fcntl.ioctl(vm.system, KVM_GET_VCPU_MMAP_SIZE)
        self._map = mmap.mmap(self.descriptor, size)
        self.state: kvm_run | None = kvm_run.from_buffer(self._map)

    def start_at(self, address: int) -> None:
        registers = self.sregs()
        registers.cs.base = registers.cs.selector = 0
        self.set_sregs(registers)
        self.set_regs(kvm_regs(rip=address, rflags=2, rsp=0x7000))

    def regs(self) -> kvm_regs:
        registers = kvm_regs()
        _set(self.descriptor, KVM_GET_REGS, registers)
        return registers

    def set_regs(self, registers: kvm_regs) -> None:
        _set(self.descriptor, KVM_SET_REGS, registers)

    def sregs(self) -> kvm_sregs:
        registers = kvm_sregs()
        _set(self.descriptor, KVM_GET_SREGS, registers)
        return registers

    def set_sregs(self, registers: kvm_sregs) -> None:
        _set(self.descriptor, KVM_SET_SREGS, registers)

    def set_cpuid(self, leaves: kvm_cpuid2) -> None:
        _set(self.descriptor, KVM_SET_CPUID2, leaves)

    def copy_state_of(self, other: Vcpu) -> None:
        """What a hop copies as device state, as far as these guests need it."""
        self.set_sregs(other.sregs())
        self.set_regs(other.regs())

    def run(self) -> int:
        """
        Run guest code until the next exit.

        :return: the exit's reason, KVM_EXIT_*.
        """
        fcntl.ioctl(self.descriptor, KVM_RUN, 0)
        assert self.state
        return int(self.state.exit_reason)

    def complete(self) -> None:
        """Finish the instruction that made the last exit, without running another."""
        assert self.state
        self.state.immediate_exit = 1
        assert outcome(self.run) == "EINTR"
        self.state.immediate_exit = 0

    def output(self, times: int) -> list[int]:
        """Run until the guest has written to its port this often; what it wrote."""
        written = []
        for _ in range(times):
            reason = self.run()
            assert reason == KVM_EXIT_IO, f"exit reason {reason}"
            written.append(self.written())
        self.complete()
        return written

    def written(self) -> int:
        """What the guest has written to its port when it exited for that."""
        assert self.state
        return ctypes.c_uint32.from_buffer(self._map, self.state.io_data_offset).value

    def close(self) -> None:
        self.state = None
        self._map.close()
        os.close(self.descriptor)


class Vm:
    """
    A virtual machine. Without arguments it is what a destination is: one vCPU, memory of its own, no SEV.

    :ivar system: /dev/kvm.
    :ivar descriptor: the VM's.
    """

    def __init__(self, *, type: int = KVM_X86_DEFAULT_VM, memory: Memory | None = None, vcpus: int = 1) -> None:
        self.closed = False
        self.system = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        self.descriptor = fcntl.ioctl(self.system, KVM_CREATE_VM, type)
        self.memory = memory or Memory()
        self.vcpus: list[Vcpu] = []
        region = kvm_userspace_memory_region(memory_size=Memory.SIZE, userspace_addr=self.memory.address)
        _set(self.descriptor, KVM_SET_USER_MEMORY_REGION, region)
        for _ in range(vcpus):
            self.add_vcpu()

    def add_vcpu(self) -> Vcpu:
        self.vcpus.append(Vcpu(self, len(self.vcpus)))
        return self.vcpus[-1]

    @property
    def vcpu(self) -> Vcpu:
        return self.vcpus[0]

    def check(self, capability: int) -> int:
        return fcntl.ioctl(self.descriptor, KVM_CHECK_EXTENSION, capability)

    def enable(self, capability: int, argument: int, flags: int = 0) -> None:
        _set(self.descriptor, KVM_ENABLE_CAP, kvm_enable_cap(cap=capability, flags=flags, args=(argument,)))

    def move_from(self, source: int, flags: int = 0) -> str:
        """
        Take over the encryption context: the call that the product is built around.

        :param source: a descriptor, of a VM or not.
        :return: see `outcome`.
        """
        # The kernel reads the argument as an unsigned int.
        return outcome(self.enable, KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM, source & 0xFFFFFFFF, flags)

    def mirror_of(self, owner: int) -> str:
        """Share the context of another VM instead of taking it over."""
        return outcome(self.enable, KVM_CAP_VM_COPY_ENC_CONTEXT_FROM, owner)

    def register_region(self, memory: Memory) -> None:
        region = kvm_enc_region(addr=memory.address, size=Memory.SIZE)
        _set(self.descriptor, KVM_MEMORY_ENCRYPT_REG_REGION, region)

    def unregister_region(self, memory: Memory) -> None:
        region = kvm_enc_region(addr=memory.address, size=Memory.SIZE)
        _set(self.descriptor, KVM_MEMORY_ENCRYPT_UNREG_REGION, region)

    def supported_cpuid(self) -> kvm_cpuid2:
        leaves = kvm_cpuid2(nent=kvm_cpuid2.MOST)
        _set(self.system, KVM_GET_SUPPORTED_CPUID, leaves)
        return leaves

    def close(self) -> None:
        """Give back everything. May be called again, in vain."""
        if self.closed:
            return
        self.closed = True
        for vcpu in self.vcpus:
            vcpu.close()
        os.close(self.descriptor)
        os.close(self.system)
        self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def command(vm: int, device: int, number: int, argument: ctypes.Structure | None = None) -> Any:
    """
    A SEV command.

    :param vm: descriptor of the VM.
    :param device: descriptor of /dev/sev.
    :param number: KVM_SEV_*.
    """
    _set(vm, KVM_MEMORY_ENCRYPT_OP, _command(device, number, argument))


def firmware_status(vm: int, device: int, number: int, argument: ctypes.Structure | None = None) -> int:
    """
    Make a SEV command.

    :return: the firmware's status; 0 if it did what the command asks for.
    :raises OSError: the kernel has refused the command.
    """
    made = _command(device, number, argument)
    try:
        _set(vm, KVM_MEMORY_ENCRYPT_OP, made)
    except OSError as error:
        if error.errno != errno.EIO or not made.error:
            raise
    return int(made.error)


def _command(device: int, number: int, argument: ctypes.Structure | None) -> kvm_sev_cmd:
    address = ctypes.addressof(argument) if argument is not None else 0
    return kvm_sev_cmd(id=number, data=address, sev_fd=device)
