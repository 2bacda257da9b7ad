"""Guest memory that the kernel has pinned, because pages of an encrypted guest must not wander."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .kvm import OK, Vm, outcome
from .sev import SevVm


@pytest.fixture
def source() -> Iterator[SevVm]:
    with SevVm.launched() as vm:
        yield vm


@pytest.fixture
def destination(source: SevVm) -> Iterator[Vm]:
    with Vm(memory=source.memory.again()) as vm:
        yield vm


def test_region_is_refused_before_the_move(destination: Vm) -> None:
    assert outcome(destination.register_region, destination.memory) == "ENOTTY"


def test_region_is_registered_after_the_move(source: SevVm, destination: Vm) -> None:
    assert destination.move_from(source.descriptor) == OK
    assert outcome(destination.register_region, destination.memory) == OK
    assert outcome(destination.unregister_region, destination.memory) == OK


def test_regions_of_the_source_move_with_the_context(source: SevVm, destination: Vm) -> None:
    """They keep the addresses that they had in the source's process."""
    assert outcome(destination.unregister_region, source.memory) == "ENOTTY"
    assert destination.move_from(source.descriptor) == OK
    assert outcome(destination.unregister_region, source.memory) == OK
    assert outcome(destination.unregister_region, source.memory) == "EINVAL"


def test_pages_are_pinned_until_the_destination_exits(source: SevVm, destination: Vm) -> None:
    source.memory.map[0x4000:0x4004] = b"page"
    assert destination.move_from(source.descriptor) == OK
    source.close()
    assert destination.memory.map[0x4000:0x4004] == b"page"
