"""
VM types. Kernels since 6.10 have types for SEV guests (KVM_SEV_INIT2); guests launched in the old way have the default
type on every kernel, and these are the ones that can be moved.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from . import kvm
from .kvm import KVM_X86_DEFAULT_VM, KVM_X86_SEV_ES_VM, KVM_X86_SEV_VM, OK, Vm, outcome
from .sev import SevVm


def _types() -> set[int]:
    with Vm() as vm:
        known = vm.check(kvm.KVM_CAP_VM_TYPES)
    return {number for number in range(32) if known & 1 << number}


@pytest.fixture
def typed() -> None:
    if KVM_X86_SEV_VM not in _types():
        pytest.skip("this kernel has no VM types for SEV")


@pytest.fixture
def source(typed: None) -> Iterator[SevVm]:
    with SevVm.launched(type=KVM_X86_SEV_VM) as vm:
        yield vm


def test_kernels_after_6_1_have_sev_types(kernel: str) -> None:
    assert _types() >= ({KVM_X86_SEV_VM, KVM_X86_SEV_ES_VM} if kernel != "6.1" else set())
    if kernel == "6.1":
        assert outcome(lambda: Vm(type=KVM_X86_SEV_VM)) == "EINVAL"


def test_typed_guest_runs_before_it_is_moved(source: SevVm) -> None:
    assert source.vcpu.output(2) == [1, 2]


def test_typed_guest_is_moved_but_does_not_run(source: SevVm) -> None:
    """
    The kernel leaves a flag unset in the destination ("need_init"): the guest is lost.

    When this test fails because the guest runs, the kernel has been repaired: the product need not refuse typed
    guests on that version any more.
    """
    with Vm(type=KVM_X86_SEV_VM, memory=source.memory.again()) as destination:
        destination.vcpu.copy_state_of(source.vcpu)
        assert destination.move_from(source.descriptor) == OK
        assert outcome(destination.vcpu.run) == "EINVAL"


@pytest.mark.parametrize("type", [KVM_X86_DEFAULT_VM, KVM_X86_SEV_ES_VM])
def test_move_is_refused_into_another_type(type: int, source: SevVm) -> None:
    with Vm(type=type) as destination:
        assert destination.move_from(source.descriptor) == "EINVAL"


@pytest.mark.parametrize("type", [KVM_X86_SEV_VM, KVM_X86_SEV_ES_VM])
def test_move_of_default_guest_is_refused_into_a_type(type: int, typed: None) -> None:
    with SevVm.launched() as source, Vm(type=type) as destination:
        assert destination.move_from(source.descriptor) == "EINVAL"


def test_sev_es_guest_moves_only_into_its_own_type(typed: None) -> None:
    with SevVm.launched(es=True, type=KVM_X86_SEV_ES_VM) as source:
        assert outcome(source.vcpu.regs) == "EINVAL"
        with Vm(type=KVM_X86_SEV_VM) as destination:
            assert destination.move_from(source.descriptor) == "EINVAL"
        with Vm(type=KVM_X86_SEV_ES_VM) as destination:
            assert outcome(destination.vcpu.regs) == OK
            assert destination.move_from(source.descriptor) == OK
            assert outcome(destination.vcpu.regs) == "EINVAL"
