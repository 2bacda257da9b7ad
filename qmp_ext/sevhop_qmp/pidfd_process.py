"""
A process that is identified by a pidfd: a pid that is used again is never mistaken for it.

What is read in ``/proc`` (proc(5)) is of this process if it lives afterwards; see :class:`PidfdProcess`.

asyncio is imported by what waits: it takes 25 ms, and a process can be looked at without it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from pathlib import Path
from typing import Self

from .errors import ProcessError
from .thread_states import ENDED, HALTED, ThreadStates

#: Seconds between two polls of a process that has exited but is not reaped: there is no notification for that.
_REAPED_POLL = 0.001
#: Seconds between two polls of the state of its threads, after as many polls without a pause.
_STATE_POLL = 0.001
_BUSY_POLLS = 50
#: Seconds in which a process that is exiting has exited, unless it waits in the kernel.
_EXIT_PATIENCE = 5.0
_EXITING = 0x4


class PidfdProcess:
    """
    A process: whether it lives, stopping it, ending it, waiting for it.

    :ivar pid: its pid in our pid namespace.
    """

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self._pidfd = pidfd
        self._proc = Path("/proc") / str(pid)

    @classmethod
    def open(cls, pid: int) -> Self:
        """:raises ProcessError: there is no such process."""
        try:
            return cls(pid, os.pidfd_open(pid))
        except OSError as err:
            raise ProcessError(f"cannot open process {pid}: {err.strerror}") from err

    def close(self) -> None:
        """Close the pidfd. The process is not affected."""
        os.close(self._pidfd)

    def fileno(self) -> int:
        """The pidfd, which stays ours."""
        return self._pidfd

    @property
    def alive(self) -> bool:
        """Whether it has a thread left. A zombie has none, unless only its first thread has exited."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return not poll.poll(0)  # pidfd_open(2): it polls as readable when all threads have exited

    async def lives_on(self) -> bool:
        """
        Whether it is alive, and not about to exit: then its end is awaited. A QEMU that is killed has lost its memory
        and its monitor some milliseconds before its last thread has exited.
        """
        if self.alive and self._ending:
            await self.wait(_EXIT_PATIENCE)
        return self.alive

    @property
    def _ending(self) -> bool:
        """Whether its first thread is exiting, or has exited (PF_EXITING, include/linux/sched.h)."""
        try:
            state, *_, flags = self._stat()[:7]
        except OSError:
            return True
        return state in "ZX" or bool(int(flags) & _EXITING)

    @property
    def threads(self) -> list[int]:
        """The ids of its threads; none when it has exited."""
        with contextlib.suppress(OSError):
            return [int(task.name) for task in (self._proc / "task").iterdir()]
        return []

    def kill(self) -> None:
        """SIGKILL; nothing happens when it has exited already."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def halt(self) -> None:
        """SIGSTOP: all its threads halt within a moment, until :meth:`thaw` or :meth:`kill`."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGSTOP)

    async def freeze(self, timeout: float, states: ThreadStates | None = None) -> bool:
        """
        :meth:`halt`, and wait until they have. Its monitors do not answer any more.

        :param states: of its threads, opened before, which is quicker.
        :return: False when that took too long, or it has exited.
        """
        import asyncio

        deadline = asyncio.get_running_loop().time() + timeout
        polls = 0
        self.halt()
        with contextlib.suppress(OSError), contextlib.ExitStack() as opened:
            states = states or opened.enter_context(ThreadStates(self.pid))
            while not (seen := states.read()) <= HALTED:
                if asyncio.get_running_loop().time() > deadline:
                    return False
                # It takes some hundredths of a millisecond, and a guest may be waiting.
                polls += 1
                await asyncio.sleep(0 if polls < _BUSY_POLLS else _STATE_POLL)
            return not seen <= ENDED
        return False

    def thread_states(self) -> ThreadStates:
        """
        Open them for :meth:`freeze`.

        :raises ProcessError: it has exited.
        """
        try:
            return ThreadStates(self.pid)
        except OSError as err:
            raise ProcessError(f"process {self.pid} has exited") from err

    @property
    def frozen(self) -> bool:
        """Whether it is halted, by :meth:`freeze` or by somebody else."""
        with contextlib.suppress(OSError), ThreadStates(self.pid) as states:
            seen = states.read()
            return seen <= HALTED and not seen <= ENDED and self.alive
        return False

    def thaw(self) -> None:
        """SIGCONT; nothing happens when it is not halted, or has exited."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGCONT)

    async def wait(self, timeout: float) -> bool:
        """Wait until the process has exited. :return: False when it has not within ``timeout`` seconds."""
        import asyncio

        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(self._pidfd, ended.set)
        try:
            async with asyncio.timeout(timeout):
                await ended.wait()
        except TimeoutError:
            return False
        finally:
            loop.remove_reader(self._pidfd)
        return True

    @property
    def start_time(self) -> int:
        """
        When it was started, in clock ticks since boot. No two processes have the same pid and start time.

        :raises ProcessError: it has exited.
        """
        try:
            return int(self._stat()[19])
        except OSError as err:
            raise self._unreadable("stat", err) from err

    def _stat(self) -> list[str]:
        """The fields of ``/proc/PID/stat`` from the third on; the second may have blanks and parentheses in it."""
        return (self._proc / "stat").read_text(errors="replace").rpartition(")")[2].split()

    async def wait_reaped(self, timeout: float) -> bool:
        """Wait until it has exited and was reaped by its parent. :return: False when that took too long."""
        import asyncio

        deadline = asyncio.get_running_loop().time() + timeout
        if not await self.wait(timeout):
            return False
        while (self._proc / "stat").exists():
            if asyncio.get_running_loop().time() > deadline:
                return False
            await asyncio.sleep(_REAPED_POLL)
        return True

    # -- reading /proc ---------------------------------------------------------------------------

    def _read(self, name: str) -> bytes:
        try:
            return (self._proc / name).read_bytes()
        except OSError as err:
            raise self._unreadable(name, err) from err

    def _link(self, name: str) -> str:
        try:
            return os.readlink(self._proc / name)
        except OSError as err:
            raise self._unreadable(name, err) from err

    def _unreadable(self, name: str, err: OSError) -> ProcessError:
        if not self.alive:
            return ProcessError(f"process {self.pid} has exited")
        hint = "run sevhop as root" if isinstance(err, PermissionError) else ""
        return ProcessError(f"cannot read /proc/{self.pid}/{name}: {err.strerror}", hint)
