"""What the kernel accepts although one might not expect it. Each of these is for the product to refuse, or to use."""

from __future__ import annotations

import pytest

from . import kvm
from .kvm import OK, Vm, outcome
from .processes import Thread, eventually
from .sev import COUNT, PROGRAM, SevVm


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (1, 0)])
def test_move_is_accepted_with_another_number_of_vcpus(before: int, after: int) -> None:
    with SevVm.launched(vcpus=before) as source, Vm(vcpus=after, memory=source.memory.again()) as destination:
        assert destination.move_from(source.descriptor) == OK


def test_vcpu_that_is_made_after_the_move_runs() -> None:
    with SevVm.launched() as source, Vm(vcpus=0, memory=source.memory.again()) as destination:
        assert source.vcpu.output(1) == [1]
        state = source.vcpu.sregs(), source.vcpu.regs()
        assert destination.move_from(source.descriptor) == OK
        vcpu = destination.add_vcpu()
        vcpu.set_sregs(state[0])
        vcpu.set_regs(state[1])
        assert vcpu.output(1) == [2]


def test_move_is_accepted_before_the_launch_is_finished() -> None:
    with SevVm() as source, Vm() as destination:
        source.sev(kvm.KVM_SEV_LAUNCH_START, kvm.kvm_sev_launch_start())
        assert destination.move_from(source.descriptor) == OK


def test_move_is_accepted_into_vm_that_has_run_a_guest() -> None:
    with SevVm.launched() as source, Vm() as destination:
        destination.memory.map[PROGRAM : PROGRAM + len(COUNT)] = COUNT
        destination.vcpu.start_at(PROGRAM)
        assert destination.vcpu.output(3) == [1, 2, 3]
        assert destination.move_from(source.descriptor) == OK
        assert destination.vcpu.output(1) == [4]


def test_move_is_accepted_while_source_is_outside_the_guest() -> None:
    """The kernel does not know "stopped": whoever forgets it kills the guest where it is."""
    with SevVm.launched() as source, Vm() as destination:
        counted: list[None] = []

        def serve() -> None:
            while True:
                source.vcpu.run()
                counted.append(None)

        thread = Thread(serve)
        eventually(lambda: len(counted) > 10, "the guest counts")
        assert destination.move_from(source.descriptor) == OK
        assert thread.join() == "EIO"
        assert outcome(source.vcpu.run) == "EIO"
