"""A move that succeeds: what the destination has afterwards, and what is left of the source."""

from __future__ import annotations

import fcntl

from . import kvm
from .kvm import KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM, OK, Memory, Vm, outcome
from .sev import SevVm, contexts


def test_guest_resumes_where_it_stopped() -> None:
    with SevVm.launched() as source, Vm(memory=source.memory.again()) as destination:
        assert source.vcpu.output(100) == list(range(1, 101))
        destination.vcpu.copy_state_of(source.vcpu)
        before = contexts()
        assert destination.move_from(source.descriptor) == OK
        assert contexts() == before, "the firmware does not notice a move"
        assert destination.vcpu.output(100) == list(range(101, 201))


def test_destination_runs_on_when_the_source_is_closed() -> None:
    with SevVm.launched() as source, Vm(memory=source.memory.again()) as destination:
        destination.vcpu.copy_state_of(source.vcpu)
        assert destination.move_from(source.descriptor) == OK
        assert destination.vcpu.output(1) == [1]
        source.close()
        assert destination.vcpu.output(1) == [2]
        assert len(contexts()) == 1


def test_context_is_destroyed_with_the_destination() -> None:
    with SevVm.launched() as source:
        with Vm(memory=source.memory.again()) as destination:
            assert destination.move_from(source.descriptor) == OK
        assert contexts() == []


def test_every_call_on_the_source_is_eio_afterwards() -> None:
    with SevVm.launched() as source, Vm() as destination, Vm() as another:
        assert destination.move_from(source.descriptor) == OK
        region = kvm.kvm_userspace_memory_region(slot=5)
        assert outcome(source.check, KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM) == "EIO"
        assert outcome(source.add_vcpu) == "EIO"
        assert outcome(fcntl.ioctl, source.descriptor, kvm.KVM_SET_USER_MEMORY_REGION, region) == "EIO"
        assert outcome(source.unregister_region, source.memory) == "EIO"
        assert outcome(source.sev, kvm.KVM_SEV_GUEST_STATUS, kvm.kvm_sev_guest_status()) == "EIO"
        assert outcome(source.vcpu.run) == "EIO"
        assert outcome(source.vcpu.regs) == "EIO"
        # It can be no destination either. As a source it is a VM like any other, without a context.
        assert source.move_from(destination.descriptor) == "EIO"
        assert another.move_from(source.descriptor) == "EINVAL"


def test_guest_survives_fifty_moves_in_a_row() -> None:
    memory = Memory()
    owner: Vm = SevVm.launched(memory=memory.again())
    for hop in range(50):
        assert owner.vcpu.output(1) == [hop + 1]
        destination = Vm(memory=memory.again())
        destination.vcpu.copy_state_of(owner.vcpu)
        assert destination.move_from(owner.descriptor) == OK, f"hop {hop}"
        owner.close()
        owner = destination
    assert owner.vcpu.output(1) == [51]
    assert len(contexts()) == 1
    owner.close()
    memory.close()


def test_capability_is_reported_by_the_system_and_by_the_vm() -> None:
    # Also where there is no SEV at all: it proves nothing. Here only that it is not missing where there is.
    with Vm() as vm:
        assert vm.check(KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM) == 1
        assert fcntl.ioctl(vm.system, kvm.KVM_CHECK_EXTENSION, KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM) == 1
