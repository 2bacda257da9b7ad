"""A mirror is a second VM that uses the context of a first, its owner (for a helper inside the guest)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .kvm import OK, Vm
from .sev import SevVm, contexts


@pytest.fixture
def owner() -> Iterator[SevVm]:
    with SevVm.launched() as vm:
        yield vm


@pytest.fixture
def mirror(owner: SevVm) -> Iterator[Vm]:
    with Vm(vcpus=0) as vm:
        assert vm.mirror_of(owner.descriptor) == OK
        yield vm


def test_owner_moves_before_its_mirror(owner: SevVm, mirror: Vm) -> None:
    with Vm(memory=owner.memory.again()) as new_owner, Vm() as new_mirror:
        new_owner.vcpu.copy_state_of(owner.vcpu)
        assert new_owner.move_from(owner.descriptor) == OK
        assert new_mirror.move_from(mirror.descriptor) == OK
        assert new_owner.vcpu.output(1) == [1]


def test_mirror_moves_before_its_owner(owner: SevVm, mirror: Vm) -> None:
    with Vm(memory=owner.memory.again()) as new_owner, Vm() as new_mirror:
        new_owner.vcpu.copy_state_of(owner.vcpu)
        assert new_mirror.move_from(mirror.descriptor) == OK
        assert new_owner.move_from(owner.descriptor) == OK
        assert new_owner.vcpu.output(1) == [1]


def test_context_lasts_until_the_mirror_ends_as_well(owner: SevVm, mirror: Vm) -> None:
    with Vm() as new_owner:
        assert new_owner.move_from(owner.descriptor) == OK
    owner.close()
    assert len(contexts()) == 1
    mirror.close()
    assert contexts() == []


def test_mirror_cannot_take_over_a_guest(owner: SevVm, mirror: Vm) -> None:
    with SevVm.launched() as other:
        assert mirror.move_from(other.descriptor) == "EINVAL"
