"""
Memory of an encrypted guest, under a key of the guest and of the page's place: a copy of it is garbage, and only what
is moved with its pages runs on. Elsewhere in the lab nothing distinguishes a copied page from the page.
"""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from ..contract.kvm import KVM_EXIT_IO, OK, Memory, Vcpu, Vm
from ..contract.sev import COUNT, COUNTER, PROGRAM, SevVm, contexts

PAGE = 0x1000
#: Seconds after which a guest that executes garbage is interrupted.
PATIENCE = 5


class _Interrupted(Exception):
    pass


@contextmanager
def _limited() -> Iterator[None]:
    def interrupt(number: int, frame: object) -> None:
        raise _Interrupted

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def counts(vcpu: Vcpu, expected: int) -> bool:
    """Whether the guest writes this number next. One that is lost writes another, shuts down, or does not end."""
    try:
        with _limited():
            return vcpu.run() == KVM_EXIT_IO and vcpu.written() == expected
    except (_Interrupted, OSError):
        return False


def copy_of(memory: Memory) -> Memory:
    """What a migration would do: the same bytes in other pages."""
    copy = Memory()
    copy.map[:] = memory.map[:]
    return copy


@pytest.fixture
def source() -> Iterator[SevVm]:
    """A guest that has counted to 3; program and counter are encrypted."""
    with SevVm.launched(pages=2) as vm:
        assert vm.vcpu.output(3) == [1, 2, 3]
        yield vm


@pytest.fixture
def destination(source: SevVm) -> Iterator[Vm]:
    """A VM with the pages of the source."""
    with Vm(memory=source.memory.again()) as vm:
        vm.vcpu.copy_state_of(source.vcpu)
        yield vm


def test_host_reads_neither_program_nor_counter(source: SevVm) -> None:
    assert source.memory.map[PROGRAM : PROGRAM + len(COUNT)] != COUNT
    assert source.memory.word(COUNTER) != 3


def test_guest_counts_on_after_each_of_ten_moves(source: SevVm) -> None:
    owner: Vm = source
    for count in range(4, 14):
        destination = Vm(memory=owner.memory.again())
        destination.vcpu.copy_state_of(owner.vcpu)
        assert destination.move_from(owner.descriptor) == OK
        if owner is not source:
            owner.close()
        owner = destination
        assert owner.vcpu.output(1) == [count]
    owner.close()


def test_guest_is_lost_in_a_copy_of_its_memory(source: SevVm) -> None:
    with Vm(memory=copy_of(source.memory)) as destination:
        destination.vcpu.copy_state_of(source.vcpu)
        assert destination.move_from(source.descriptor) == OK
        assert not counts(destination.vcpu, 4)


def test_guest_is_lost_in_its_own_memory_without_the_move(source: SevVm, destination: Vm) -> None:
    assert not counts(destination.vcpu, 4)


def test_page_is_garbage_at_another_address(source: SevVm) -> None:
    elsewhere = PROGRAM - PAGE
    source.memory.map[elsewhere : elsewhere + PAGE] = source.memory.map[PROGRAM : PROGRAM + PAGE]
    source.vcpu.start_at(PROGRAM)
    assert counts(source.vcpu, 4)
    # Last: what garbage does with memory and registers is different with each key.
    source.vcpu.start_at(elsewhere)
    assert not counts(source.vcpu, 5)


@pytest.fixture
def one_asid_left() -> Iterator[None]:
    """KVM reuses an ASID at once only if there is no other."""
    capacity = dict(line.split() for line in Path("/sys/fs/cgroup/misc.capacity").read_text().splitlines())
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    with ExitStack() as taken:
        for _ in range(int(capacity["sev"]) - 1):
            taken.enter_context(SevVm(vcpus=0))
        yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.usefixtures("one_asid_left")
def test_reused_asid_has_another_key() -> None:
    """A guest sees the pages of its predecessor with this ASID, which has counted to 3."""
    with SevVm.launched(pages=2) as first:
        assert first.vcpu.output(3) == [1, 2, 3]
        (before,) = contexts()
        memory = first.memory.again()
    with SevVm.launched(memory=memory) as second:
        (after,) = contexts()
        assert (after.asid, after.handle) == (before.asid, before.handle + 1)
        assert not counts(second.vcpu, 4)


def test_host_writes_garbage(source: SevVm) -> None:
    """Bytes that the host writes are not what the guest reads."""
    source.memory.map[COUNTER : COUNTER + 4] = (100).to_bytes(4, "little")
    assert not counts(source.vcpu, 101)
