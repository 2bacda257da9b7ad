"""What the kernel refuses, and that a refusal harms nobody."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator

import pytest

from .kvm import OK, Vm
from .processes import Child, Thread
from .sev import SevVm


@pytest.fixture
def source() -> Iterator[SevVm]:
    """A running guest. After the test it must still be one: its next count follows the last, and it can be moved."""
    with SevVm.launched() as vm:
        assert vm.vcpu.output(3) == [1, 2, 3]
        yield vm
        assert vm.vcpu.output(1) == [4]
        with Vm(memory=vm.memory.again()) as destination:
            destination.vcpu.copy_state_of(vm.vcpu)
            assert destination.move_from(vm.descriptor) == OK
            assert destination.vcpu.output(1) == [5]


@pytest.fixture
def destination() -> Iterator[Vm]:
    with Vm() as vm:
        yield vm


def test_move_refuses_guest_into_itself(source: SevVm) -> None:
    assert source.move_from(source.descriptor) == "EINVAL"


def test_move_refuses_plain_vm_into_itself(destination: Vm) -> None:
    assert destination.move_from(destination.descriptor) == "EINVAL"


def test_move_refuses_source_without_sev(destination: Vm) -> None:
    with Vm() as plain:
        assert destination.move_from(plain.descriptor) == "EINVAL"


def test_move_refuses_destination_that_is_a_guest(source: SevVm) -> None:
    with SevVm.launched() as other:
        assert other.move_from(source.descriptor) == "EINVAL"
        assert other.vcpu.output(1) == [1]


def test_move_refuses_destination_that_took_a_guest_over(source: SevVm, destination: Vm) -> None:
    with SevVm.launched() as first:
        assert destination.move_from(first.descriptor) == OK
        assert destination.move_from(source.descriptor) == "EINVAL"


def test_move_refuses_flags(source: SevVm, destination: Vm) -> None:
    assert destination.move_from(source.descriptor, flags=1) == "EINVAL"


@pytest.mark.parametrize("path", ["/dev/null", "/dev/sev", "/dev/kvm", "/etc/passwd", "/"])
def test_move_refuses_descriptor_of_a_file(path: str, destination: Vm) -> None:
    file = os.open(path, os.O_RDONLY)
    assert destination.move_from(file) == "EBADF"
    os.close(file)


def test_move_refuses_descriptor_of_an_eventfd(destination: Vm) -> None:
    event = os.eventfd(0)
    assert destination.move_from(event) == "EBADF"
    os.close(event)


def test_move_refuses_descriptor_of_a_vcpu(source: SevVm, destination: Vm) -> None:
    assert destination.move_from(source.vcpu.descriptor) == "EBADF"


@pytest.mark.parametrize("number", [9999, -1])
def test_move_refuses_descriptor_that_is_not_open(number: int, destination: Vm) -> None:
    assert destination.move_from(number) == "EBADF"


def _in_another_process(move: Callable[[], str]) -> str:
    def work(parent: socket.socket) -> None:
        parent.sendall(move().encode())

    with Child(work) as child:
        heard = child.hear()
        assert child.wait() == 0
        return heard


def test_move_refuses_process_that_inherited_the_destination(source: SevVm, destination: Vm) -> None:
    assert _in_another_process(lambda: destination.move_from(source.descriptor)) == "EIO"


def test_move_refuses_another_process_with_a_duplicate(source: SevVm, destination: Vm) -> None:
    def move() -> str:
        destination.descriptor = os.dup(destination.descriptor)
        return destination.move_from(os.dup(source.descriptor))

    assert _in_another_process(move) == "EIO"


def test_call_from_another_thread_is_not_refused() -> None:
    # What counts is the address space.
    with SevVm.launched() as source, Vm() as destination:
        results: list[str] = []
        Thread(lambda: results.append(destination.move_from(source.descriptor))).join()
        assert results == [OK]
