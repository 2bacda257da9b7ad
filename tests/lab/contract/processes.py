"""Other processes and threads, and ways to see what they wait for."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from .kvm import Vcpu, outcome

PATIENCE = 30.0  # seconds; in emulation things take long


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait until the condition holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE:g} s"
        time.sleep(0.005)


class Child:
    """
    A process with an address space of its own, killed at the end of the block.

    :param work: runs in it, with a socket to the parent; the process exits after it.
    :ivar socket: the parent's end. Messages are short and keep their boundaries.
    """

    def __init__(self, work: Callable[[socket.socket], None]) -> None:
        self.socket, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(PATIENCE)
        self.status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                self.socket.close()
                work(far)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        far.close()

    def say(self, word: str) -> None:
        self.socket.sendall(word.encode())

    def hear(self) -> str:
        """The child's next message; empty if it has exited."""
        return self.socket.recv(4096).decode()

    def hear_descriptors(self, number: int) -> list[int]:
        _, descriptors, _, _ = socket.recv_fds(self.socket, 4096, number)
        assert len(descriptors) == number
        return descriptors

    def wait(self) -> int:
        """Wait for its exit: its exit code, or -N for signal N. All that it had open is closed then."""
        if self.status is None:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status

    def kill(self) -> int:
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self.socket.close()


def send_descriptors(to: socket.socket, descriptors: Sequence[int]) -> None:
    socket.send_fds(to, [b"descriptors"], descriptors)


class Thread:
    """A call in a thread of its own, whose outcome is kept: see `outcome`."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.outcome: str | None = None
        self._call = call
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.outcome = outcome(self._call)

    def waits_in_kernel(self) -> bool:
        """Whether it sleeps so that only a fatal signal can wake it."""
        return state(self._thread.native_id or 0) == "D"

    def signal(self, number: int) -> None:
        signal.pthread_kill(self._thread.ident or 0, number)

    def join(self) -> str:
        self._thread.join(PATIENCE)
        assert self.outcome is not None, "the call has not returned"
        return self.outcome


def state(task: int) -> str:
    """The state letter of a thread or process, see proc(5)."""
    return Path(f"/proc/{task}/stat").read_text().rpartition(")")[2].split()[0]


class Running:
    """
    A vCPU inside KVM_RUN, executing a program that does not leave the guest, until the end of the block.

    :param counter: reads the guest's counter, which grows while it runs.
    """

    def __init__(self, vcpu: Vcpu, counter: Callable[[], int]) -> None:
        self._vcpu = vcpu
        self._counter = counter
        # Nothing else: the signal is there to interrupt.
        self._before = signal.signal(signal.SIGUSR1, lambda *_: None)
        self.thread = Thread(vcpu.run)

    def __enter__(self) -> Self:
        self.see_it_count()
        return self

    def see_it_count(self) -> None:
        """Wait until the guest has executed more of its program."""
        seen = self._counter()
        eventually(lambda: self._counter() != seen, "the guest counts")

    def leave(self) -> str:
        """Make the vCPU leave the guest. The outcome of its KVM_RUN."""
        if self._vcpu.state:
            self._vcpu.state.immediate_exit = 1
        if self.thread.outcome is None:
            self.thread.signal(signal.SIGUSR1)
        result = self.thread.join()
        if self._vcpu.state:
            self._vcpu.state.immediate_exit = 0
        return result

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()
        signal.signal(signal.SIGUSR1, self._before)
