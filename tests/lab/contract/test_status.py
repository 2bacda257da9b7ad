"""
KVM_SEV_GUEST_STATUS after a move, which QEMU's query-sev is made of.

The kernel remembers which descriptor of the process was /dev/sev at the launch, and the move does not carry that
over: it looks at descriptor 0.
"""

from __future__ import annotations

import os
import socket

import pytest

from .kvm import OK, Vm, outcome
from .processes import Child
from .sev import POLICY_SEV, POLICY_SEV_ES, RUNNING, SevVm, contexts, guest_status


@pytest.mark.parametrize("es", [False, True])
def test_status_is_available_through_descriptor_0(es: bool) -> None:
    with SevVm.launched(es=es) as source:
        (context,) = contexts()

        # In a process of its own, because it changes its stdin.
        def work(parent: socket.socket) -> None:
            with Vm() as destination:
                before = outcome(guest_status, destination)
                assert destination.move_from(source.descriptor) == OK
                os.dup2(os.open("/dev/null", os.O_RDWR), 0)
                elsewhere = outcome(guest_status, destination)
                os.dup2(os.open("/dev/sev", os.O_RDWR), 0)
                status = guest_status(destination)
                parent.sendall(f"{before} {elsewhere} {status.handle} {status.policy} {status.state}".encode())

        with Child(work) as child:
            before, elsewhere, *status = child.hear().split()
            assert child.wait() == 0
        assert before == "ENOTTY"
        assert elsewhere == "EBADF"
        assert [int(word) for word in status] == [context.handle, POLICY_SEV_ES if es else POLICY_SEV, RUNNING]
