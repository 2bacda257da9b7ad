"""SEV-ES: the registers are part of the encrypted guest, and move with it."""

from __future__ import annotations

import pytest

from .kvm import OK, Vm, kvm_regs, outcome
from .sev import SevVm, contexts


@pytest.mark.parametrize("vcpus", [1, 2])
def test_guest_with_encrypted_registers_is_moved(vcpus: int) -> None:
    with SevVm.launched(es=True, vcpus=vcpus) as source, Vm(vcpus=vcpus) as destination:
        (context,) = contexts()
        assert context.vmsas == vcpus
        assert destination.move_from(source.descriptor) == OK
        assert contexts() == [context]
        source.close()
        assert contexts() == [context]


def test_register_ioctls_succeed_without_effect() -> None:
    """They reach only KVM's own copy, which the guest does not use. (VMs of type SEV_ES refuse them: test_types.)"""
    with SevVm.launched(es=True) as source, Vm() as destination:
        registers = source.vcpu.regs()
        assert outcome(source.vcpu.set_regs, registers) == OK
        assert destination.move_from(source.descriptor) == OK
        assert outcome(destination.vcpu.set_regs, registers) == OK
        assert outcome(destination.vcpu.sregs) == OK


def test_move_is_refused_before_registers_are_encrypted() -> None:
    """A launch that was not completed. QEMU completes it before a guest runs."""
    with SevVm.launched(es=True, vmsa=False) as source, Vm() as destination:
        assert destination.move_from(source.descriptor) == "EINVAL"
        destination.vcpu.set_regs(kvm_regs(rflags=2))


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (1, 0)])
def test_move_is_refused_with_another_number_of_vcpus(before: int, after: int) -> None:
    with SevVm.launched(es=True, vcpus=before) as source, Vm(vcpus=after) as destination:
        assert destination.move_from(source.descriptor) == "EINVAL"
        for _ in range(before - after):
            destination.add_vcpu()
        if after < before:
            assert destination.move_from(source.descriptor) == OK


def test_guest_is_moved_three_times() -> None:
    owner: Vm = SevVm.launched(es=True)
    for _ in range(3):
        destination = Vm()
        assert destination.move_from(owner.descriptor) == OK
        owner.close()
        owner = destination
    assert len(contexts()) == 1
    owner.close()
