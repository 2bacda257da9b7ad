"""Somebody else who moves the context of a guest that is about to hop."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import socket
import struct
from typing import Self

from ..contract.kvm import KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM, KVM_ENABLE_CAP, Vm, kvm_enable_cap
from ..contract.processes import Child, Running, eventually, state
from ..contract.sev import COUNTER, PROGRAM, SPIN

_CLONE_VM = 0x100
_CLONE_FILES = 0x400
_WALL = 0x40000000


class Competitor:
    """
    A move of the source's context to somewhere else, which does not end: it waits for a vCPU of its own destination to
    leave the guest. The kernel has both VMs marked as migrating meanwhile.

    The waiting call is made by a process of its own that shares memory with the destination's, as KVM demands, and can
    be killed alone. Were the vCPU ended with it, the move might still succeed.
    """

    def __init__(self, source: int) -> None:
        def work(parent: socket.socket) -> None:
            with Vm() as destination:
                destination.memory.map[PROGRAM : PROGRAM + len(SPIN)] = SPIN
                destination.vcpu.start_at(PROGRAM)
                with Running(destination.vcpu, lambda: destination.memory.word(COUNTER)):
                    pid = _move_in_another_process(destination, source)
                    eventually(lambda: state(pid) == "D", "the competing move waits")
                    parent.sendall(b"waiting")
                    parent.recv(1)
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)

        self._child = Child(work)
        assert self._child.hear() == "waiting"

    def give_up(self) -> None:
        """The move ends, rolled back by the kernel."""
        self._child.say(".")
        assert self._child.wait() == 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.socket.close()


def _move_in_another_process(destination: Vm, source: int) -> int:
    """
    Begin a move in a process that has our memory and descriptors and is otherwise its own.

    :return: its pid. It exits after the call, with the errno as exit status.
    """
    request = kvm_enable_cap(cap=KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM, args=(source,))
    code = b"".join(
        (
            b"\xb8" + struct.pack("<I", 16),  # mov $SYS_ioctl, %eax
            b"\xbf" + struct.pack("<I", destination.descriptor),  # mov $descriptor, %edi
            b"\xbe" + struct.pack("<I", KVM_ENABLE_CAP),  # mov $request, %esi
            b"\x48\xba" + struct.pack("<Q", ctypes.addressof(request)),  # mov $argument, %rdx
            b"\x0f\x05",  # syscall
            b"\x89\xc7\xf7\xdf",  # mov %eax, %edi; neg %edi
            b"\xb8" + struct.pack("<I", 60),  # mov $SYS_exit, %eax
            b"\x0f\x05",  # syscall
        )
    )
    # Python code cannot run there: it would take this process for its own.
    page = mmap.mmap(-1, 2 * mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page[: len(code)] = code
    start = ctypes.addressof(ctypes.c_char.from_buffer(page))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.clone.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
    pid = int(libc.clone(start, start + 2 * mmap.PAGESIZE, _CLONE_VM | _CLONE_FILES | signal.SIGCHLD, None))
    assert pid > 0, os.strerror(ctypes.get_errno())
    _alive.append((request, page))
    return pid


#: What such processes use, for as long as they may.
_alive: list[tuple[ctypes.Structure, mmap.mmap]] = []
