"""
The states of the threads of a process (proc_pid_stat(5)): whether it executes anything.

A guest may be waiting when they are looked at, so the files stay open between two looks: one system call for each
thread, and one for those that have come.
"""

from __future__ import annotations

import os
from typing import Self

#: States of threads that do not run, nor will unless they are told to; and of those that never will.
HALTED = frozenset("TZX")
ENDED = frozenset("ZX")

#: A ``stat`` begins with the id, the name in parentheses, which is short, and the state.
_HEAD = 256


class ThreadStates:
    """The states of all threads of one process."""

    def __init__(self, pid: int) -> None:
        """:raises OSError: it has ended, and is not even a zombie."""
        self._directory = os.open(f"/proc/{pid}/task", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._files: dict[str, int] = {}
        try:
            self.look()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the process."""
        while self._files:
            os.close(self._files.popitem()[1])
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1

    def look(self) -> set[str]:
        """
        Their states, now: a letter for each that occurs, ``X`` for one that has just ended.

        :raises OSError: the process has ended, and is not even a zombie.
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
