"""A directory of a process in /proc, kept open: what is read in it later is of this process, whoever gets its pid."""

from __future__ import annotations

import os
from typing import Self


class ProcDirectory:
    """A context manager; :meth:`close` may be called more than once."""

    def __init__(self, pid: int, name: str) -> None:
        """
        :param name: below ``/proc/PID``.
        :raises OSError: the process has exited, or permission is denied.
        """
        self._directory = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the directory."""
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1
