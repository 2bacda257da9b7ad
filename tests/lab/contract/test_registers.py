"""
The C-bit in CR3. A guest that uses encryption has page tables whose addresses carry this bit, and CR3 does as well.

KVM takes such a CR3 only from a VM that is a SEV guest at the moment when CPUID is set. A destination sets CPUID when
it starts, before it is one.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .kvm import OK, Vcpu, Vm, kvm_cpuid2, kvm_cpuid_entry2, kvm_sregs, outcome
from .sev import SevVm

LARGEST_EXTENDED = 0x80000000
ENCRYPTION = 0x8000001F
C_BIT = 51

CR0_PE, CR0_PG = 1 << 0, 1 << 31
CR4_PAE = 1 << 5
EFER_LME, EFER_LMA = 1 << 8, 1 << 10


def _cpuid(vm: Vm) -> kvm_cpuid2:
    """What KVM supports, with the encryption leaf that QEMU adds for a SEV guest."""
    leaves = vm.supported_cpuid()
    entries = {entry.function: entry for entry in leaves.entries[: leaves.nent]}
    if ENCRYPTION not in entries:
        leaves.entries[leaves.nent] = kvm_cpuid_entry2(function=ENCRYPTION)
        entries[ENCRYPTION] = leaves.entries[leaves.nent]
        leaves.nent += 1
    entries[LARGEST_EXTENDED].eax = ENCRYPTION
    entries[ENCRYPTION].eax = 1 << 1
    entries[ENCRYPTION].ebx = C_BIT | 1 << 6
    return leaves


def _long_mode(vcpu: Vcpu, cr3: int) -> kvm_sregs:
    registers = vcpu.sregs()
    registers.cr0 |= CR0_PE | CR0_PG
    registers.cr4 |= CR4_PAE
    registers.efer |= EFER_LME | EFER_LMA
    registers.cs.l, registers.cs.db = 1, 0
    registers.cr3 = cr3
    return registers


def _encrypted(vcpu: Vcpu) -> kvm_sregs:
    return _long_mode(vcpu, 0x1000 | 1 << C_BIT)


@pytest.fixture
def source() -> Iterator[SevVm]:
    with SevVm.launched() as vm:
        vm.vcpu.set_cpuid(_cpuid(vm))
        vm.vcpu.set_sregs(_encrypted(vm.vcpu))
        yield vm


@pytest.fixture
def destination() -> Iterator[Vm]:
    with Vm() as vm:
        vm.vcpu.set_cpuid(_cpuid(vm))
        yield vm


def test_long_mode_without_encryption_bit_is_accepted_before_the_move(destination: Vm) -> None:
    """This is how registers can be validated while there is a way back."""
    assert outcome(destination.vcpu.set_sregs, _long_mode(destination.vcpu, 0x1000)) == OK


def test_encryption_bit_is_refused_before_the_move(destination: Vm) -> None:
    assert outcome(destination.vcpu.set_sregs, _encrypted(destination.vcpu)) == "EINVAL"


def test_encryption_bit_is_refused_after_the_move_until_cpuid_is_set(source: SevVm, destination: Vm) -> None:
    wanted = source.vcpu.sregs()
    assert wanted.cr3 >> C_BIT == 1
    assert destination.move_from(source.descriptor) == OK
    assert outcome(destination.vcpu.set_sregs, wanted) == "EINVAL"
    destination.vcpu.set_cpuid(_cpuid(destination))
    assert outcome(destination.vcpu.set_sregs, wanted) == OK
    assert destination.vcpu.sregs().cr3 == wanted.cr3
