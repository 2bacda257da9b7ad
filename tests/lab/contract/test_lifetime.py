"""The source's descriptor is the guest: who holds it can move it, from anywhere, even when its process is no more."""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from . import kvm
from .kvm import OK, Memory, Vm, outcome
from .processes import Child, Running, eventually, send_descriptors
from .sev import COUNT, COUNTER, PROGRAM, SPIN, SevVm, contexts

SYS_PIDFD_GETFD = 438


@dataclass
class Source:
    """A guest in a process of its own that has counted to 100.

    :ivar number: its VM's descriptor, in that process; `descriptor`: the same here, received by SCM_RIGHTS.
    """

    child: Child
    number: int
    descriptor: int
    sregs: kvm.kvm_sregs
    regs: kvm.kvm_regs

    def continue_in(self, destination: Vm) -> None:
        """The destination gets the state of the vCPU, counts on from 100 to 200, and is all that is left."""
        destination.vcpu.set_sregs(self.sregs)
        destination.vcpu.set_regs(self.regs)
        assert destination.vcpu.output(100) == list(range(101, 201))


@pytest.fixture
def memory() -> Iterator[Memory]:
    shared = Memory()
    yield shared
    shared.close()


@pytest.fixture
def source(memory: Memory) -> Iterator[Source]:
    def work(parent: socket.socket) -> None:
        with SevVm.launched(memory=memory.again()) as vm:
            assert vm.vcpu.output(100)[-1] == 100
            send_descriptors(parent, [vm.descriptor])
            parent.sendall(str(vm.descriptor).encode())
            parent.sendall(bytes(vm.vcpu.sregs()))
            parent.sendall(bytes(vm.vcpu.regs()))
            while parent.recv(10) == b"run":
                parent.sendall(outcome(vm.vcpu.run).encode())

    with Child(work) as child:
        (descriptor,) = child.hear_descriptors(1)
        number = int(child.hear())
        sregs = kvm.kvm_sregs.from_buffer_copy(child.socket.recv(4096))
        regs = kvm.kvm_regs.from_buffer_copy(child.socket.recv(4096))
        yield Source(child, number, descriptor, sregs, regs)
        os.close(descriptor)


@pytest.fixture
def destination(memory: Memory) -> Iterator[Vm]:
    with Vm(memory=memory.again()) as vm:
        yield vm


def test_guest_moves_by_descriptor_passed_over_a_socket(source: Source, destination: Vm) -> None:
    assert destination.move_from(source.descriptor) == OK
    source.child.say("run")
    assert source.child.hear() == "EIO"
    source.continue_in(destination)


def test_guest_moves_by_descriptor_taken_with_pidfd_getfd(source: Source, destination: Vm) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    process = os.pidfd_open(source.child.pid)
    taken = libc.syscall(SYS_PIDFD_GETFD, process, source.number, 0)
    os.close(process)
    assert taken >= 0, os.strerror(ctypes.get_errno())
    assert destination.move_from(taken) == OK
    os.close(taken)
    source.continue_in(destination)


def test_guest_moves_after_source_has_exited(source: Source, destination: Vm) -> None:
    before = contexts()
    source.child.say("exit")
    assert source.child.wait() == 0
    assert contexts() == before, "the descriptor keeps the context"
    assert destination.move_from(source.descriptor) == OK
    source.continue_in(destination)


def test_guest_moves_after_source_was_killed(source: Source, destination: Vm) -> None:
    source.child.kill()
    assert destination.move_from(source.descriptor) == OK
    source.continue_in(destination)


def test_context_is_destroyed_with_the_last_descriptor(source: Source) -> None:
    source.child.kill()
    assert len(contexts()) == 1
    os.close(source.descriptor)
    assert contexts() == []
    source.descriptor = os.open("/dev/null", os.O_RDONLY)


def test_guest_moves_after_source_killed_inside_the_guest(memory: Memory, destination: Vm) -> None:
    def work(parent: socket.socket) -> None:
        with SevVm.launched(memory=memory.again(), program=SPIN) as vm:
            send_descriptors(parent, [vm.descriptor])
            vm.vcpu.run()

    with Child(work) as child:
        (descriptor,) = child.hear_descriptors(1)
        eventually(lambda: memory.word(COUNTER) > 0, "the guest counts")
        child.kill()
    counted = memory.word(COUNTER)
    assert destination.move_from(descriptor) == OK
    os.close(descriptor)
    # The state of its vCPU is lost with the process; memory and context are not.
    destination.vcpu.start_at(PROGRAM)
    with Running(destination.vcpu, lambda: memory.word(COUNTER)):
        assert memory.word(COUNTER) > counted


def test_guest_moves_on_after_destination_was_killed(source: Source, memory: Memory) -> None:
    """After the move the guest is in the destination's VM. Who holds that descriptor can bring it into a third."""

    def work(parent: socket.socket) -> None:
        with Vm(memory=memory.again()) as vm:
            assert vm.move_from(source.descriptor) == OK
            send_descriptors(parent, [vm.descriptor])
            parent.recv(1)

    with Child(work) as child:
        (fd,) = child.hear_descriptors(1)
        child.kill()
    source.child.kill()
    with Vm(memory=memory.again()) as third:
        assert third.move_from(fd) == OK
        os.close(fd)
        source.continue_in(third)


def test_guest_program_writes_each_number_once(memory: Memory) -> None:
    """COUNT writes each number once; without this the other tests would prove nothing."""
    with Vm(memory=memory.again()) as plain:
        memory.map[PROGRAM : PROGRAM + len(COUNT)] = COUNT
        plain.vcpu.start_at(PROGRAM)
        assert plain.vcpu.output(5) == [1, 2, 3, 4, 5]
        assert memory.word(COUNTER) in (5, 6)
