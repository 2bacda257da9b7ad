"""
The states of the threads of a process (proc_pid_stat(5)): whether it executes anything.

A guest may wait while they are read, so the files stay open between two reads: one system call for each thread, and
one more for each new thread.
"""

from __future__ import annotations

import os

from .proc_directory import ProcDirectory

#: States of threads that do not run until they are continued or killed; and of those that never will.
HALTED = frozenset("TZX")
ENDED = frozenset("ZX")

#: A ``stat`` begins with the id, the name in parentheses, which is short, and the state.
_HEAD = 256


class ThreadStates(ProcDirectory):
    """The states of all threads of one process."""

    def __init__(self, pid: int) -> None:
        """:raises OSError: it has exited, and was reaped."""
        super().__init__(pid, "task")
        self._files: dict[str, int] = {}
        try:
            self.read()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the files as well."""
        while self._files:
            os.close(self._files.popitem()[1])
        super().close()

    def read(self) -> set[str]:
        """
        Their states, now: a letter for each that occurs, ``X`` for one that has just exited.

        :raises OSError: the process has exited, and was reaped.
        """
        return {self._state(thread) for thread in os.listdir(self._directory)}

    def _state(self, thread: str) -> str:
        try:
            file = self._files.get(thread)
            if file is None:
                file = os.open(f"{thread}/stat", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._directory)
                self._files[thread] = file
            text = os.pread(file, _HEAD, 0)
        except (FileNotFoundError, ProcessLookupError):
            return "X"
        return chr(text[text.rindex(b")") + 2])
