"""A vCPU inside the guest holds up the move, and a move that waits keeps others out."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator

import pytest

from .kvm import OK, Vm
from .processes import Child, Running, Thread, eventually, state
from .sev import COUNTER, PROGRAM, RUNNING, SPIN, SevVm, guest_status


class Move(Thread):
    """A move in a thread. The thread's own outcome means nothing; `result` is the move's."""

    def __init__(self, destination: Vm, source: int) -> None:
        self.result = "pending"
        super().__init__(lambda: self._move(destination, source))

    def _move(self, destination: Vm, source: int) -> None:
        self.result = destination.move_from(source)

    def see_it_wait(self) -> None:
        eventually(self.waits_in_kernel, "the move waits")
        assert self.result == "pending"


@pytest.fixture
def source() -> Iterator[SevVm]:
    with SevVm.launched(program=SPIN) as vm:
        yield vm


@pytest.fixture
def inside(source: SevVm) -> Iterator[Running]:
    """The source's vCPU is inside the guest."""
    with Running(source.vcpu, lambda: source.memory.word(COUNTER)) as running:
        yield running


@pytest.fixture
def destination() -> Iterator[Vm]:
    with Vm() as vm:
        yield vm


def test_move_waits_for_a_vcpu_of_the_source(source: SevVm, inside: Running, destination: Vm) -> None:
    move = Move(destination, source.descriptor)
    move.see_it_wait()
    inside.see_it_count()
    move.see_it_wait()
    assert inside.leave() == "EINTR"
    move.join()
    assert move.result == OK


def test_move_waits_for_a_vcpu_of_the_destination(destination: Vm) -> None:
    destination.memory.map[PROGRAM : PROGRAM + len(SPIN)] = SPIN
    destination.vcpu.start_at(PROGRAM)
    with (
        SevVm.launched() as source,
        Running(destination.vcpu, lambda: destination.memory.word(COUNTER)) as running,
    ):
        move = Move(destination, source.descriptor)
        move.see_it_wait()
        running.leave()
        move.join()
        assert move.result == OK


def test_signal_does_not_end_the_waiting(source: SevVm, inside: Running, destination: Vm) -> None:
    move = Move(destination, source.descriptor)
    move.see_it_wait()
    move.signal(signal.SIGUSR1)
    inside.see_it_count()
    move.see_it_wait()
    inside.leave()
    move.join()
    assert move.result == OK


def test_other_moves_are_busy_while_one_waits(source: SevVm, inside: Running, destination: Vm) -> None:
    move = Move(destination, source.descriptor)
    move.see_it_wait()
    with Vm() as competitor, SevVm.launched() as guest:
        assert competitor.move_from(source.descriptor) == "EBUSY"
        assert destination.move_from(guest.descriptor) == "EBUSY"
        assert destination.move_from(source.descriptor) == "EBUSY"
        assert source.move_from(destination.descriptor) == "EBUSY"
        # The source that was refused can be moved elsewhere at once.
        assert competitor.move_from(guest.descriptor) == OK
    inside.see_it_count()
    inside.leave()
    move.join()
    assert move.result == OK


def test_source_is_not_busy_after_a_killed_move(source: SevVm, inside: Running, destination: Vm) -> None:
    """What the retries are made for: the competitor fails, the source remains, the next attempt succeeds."""

    def work(parent: socket.socket) -> None:
        with Vm() as competitor:
            parent.sendall(b"ready")
            parent.sendall(competitor.move_from(source.descriptor).encode())

    with Child(work) as competitor:
        assert competitor.hear() == "ready"
        eventually(lambda: state(competitor.pid) == "D", "the competitor waits")
        assert destination.move_from(source.descriptor) == "EBUSY"
        # Only SIGKILL ends the waiting, and it leaves the source as it was.
        assert competitor.kill() == -signal.SIGKILL
    inside.see_it_count()
    inside.leave()
    assert destination.move_from(source.descriptor) == OK


def test_source_of_a_killed_move_keeps_running(source: SevVm, inside: Running) -> None:
    def work(parent: socket.socket) -> None:
        with Vm() as competitor:
            parent.sendall(b"ready")
            competitor.move_from(source.descriptor)

    with Child(work) as competitor:
        assert competitor.hear() == "ready"
        eventually(lambda: state(competitor.pid) == "D", "the competitor waits")
        competitor.kill()
    inside.leave()
    with Running(source.vcpu, lambda: source.memory.word(COUNTER)):
        assert guest_status(source).state == RUNNING


def test_other_calls_on_the_source_wait_as_well(source: SevVm, inside: Running, destination: Vm) -> None:
    """The VM's lock is held all the time: whatever in the source needs it hangs, too."""
    move = Move(destination, source.descriptor)
    move.see_it_wait()
    adding = Thread(source.add_vcpu)
    eventually(adding.waits_in_kernel, "the call waits")
    inside.leave()
    move.join()
    assert move.result == OK
    adding.join()
