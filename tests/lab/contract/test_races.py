"""Two processes that move one guest to each other at the same moment."""

from __future__ import annotations

import mmap
import os
import socket
import time
from collections import Counter

from .kvm import KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM, OK, Vm, outcome
from .processes import Child, send_descriptors
from .sev import SevVm, contexts

ROUNDS = 40
TIME = 6.0  # seconds at most


class Racer:
    """One of the two: has a VM, gets the other's descriptor, and moves on command. Round after round."""

    def __init__(self, gate: mmap.mmap, sev: bool) -> None:
        self._gate = gate
        self._sev = sev
        self.child = Child(self._work)

    def _work(self, parent: socket.socket) -> None:
        while parent.recv(10) == b"round":
            with SevVm.launched() if self._sev else Vm() as vm:
                send_descriptors(parent, [vm.descriptor])
                _, (other,), _, _ = socket.recv_fds(parent, 100, 1)
                while not self._gate[0]:
                    pass
                parent.sendall(vm.move_from(other).encode())
                os.close(other)
                parent.recv(10)
                alive = outcome(vm.check, KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM) == OK
                parent.sendall(b"alive" if alive else b"dead")
                parent.recv(10)
            parent.sendall(b"closed")


def test_opposite_moves_neither_hang_nor_leak_a_context() -> None:
    """
    Never a hang, never a context that is lost in the kernel or doubled.

    Usually one of the two wins, or none. If a call has begun before the other's move ends, *both* succeed and the guest
    has gone forth and back into a VM that is dead: it is lost. So the product lets one process at a time move a guest.
    """
    gate = mmap.mmap(-1, 1)
    results: Counter[tuple[str, str]] = Counter()
    deadline = time.monotonic() + TIME
    one, two = Racer(gate, sev=True), Racer(gate, sev=False)
    with one.child, two.child:
        while sum(results.values()) < ROUNDS and time.monotonic() < deadline:
            results[_round(gate, one.child, two.child)] += 1
            assert contexts() == []
    gate.close()
    print(dict(results))


def _round(gate: mmap.mmap, guest: Child, plain: Child) -> tuple[str, str]:
    gate[0] = 0
    children = (guest, plain)
    for child in children:
        child.say("round")
    descriptors = [child.hear_descriptors(1)[0] for child in children]
    for child, descriptor in zip(children, reversed(descriptors), strict=True):
        send_descriptors(child.socket, [descriptor])
    for descriptor in descriptors:
        os.close(descriptor)
    gate[0] = 1
    back, forth = (child.hear() for child in children)
    for child in children:
        child.say("alive?")
    guest_state, plain_state = (child.hear() for child in children)
    assert len(contexts()) == 1
    match back, forth:
        case "OK", "OK":
            assert (guest_state, plain_state) == ("dead", "dead")
        case _, "OK":
            assert back in ("EINVAL", "EBUSY", "EIO")
            assert (guest_state, plain_state) == ("dead", "alive")
        case _:
            assert back in ("EINVAL", "EBUSY")
            assert forth == "EBUSY"
            assert (guest_state, plain_state) == ("alive", "alive")
    for child in children:
        child.say("close")
    for child in children:
        assert child.hear() == "closed"
    return back, forth
