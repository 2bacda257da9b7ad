"""Lines to the Linux guest: serial lines and virtio ports, which it repeats (linux_init.c)."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

#: Seconds in which the guest must answer.
PATIENCE = 150.0


class Line:
    """
    A line to the guest. Each word is sent over a new connection, as after a hop everybody has to.

    :param open_it: open the line; the descriptor.
    """

    def __init__(self, open_it: Callable[[], int]) -> None:
        self._open = open_it

    @classmethod
    def to_socket(cls, path: Path) -> Self:
        """One that is a UNIX socket."""

        def connect() -> int:
            client = socket.socket(socket.AF_UNIX)
            client.connect(str(path))
            return client.detach()

        return cls(connect)

    def answers(self, word: str) -> bool:
        """Whether the guest repeats it."""
        fd = self._open()
        try:
            os.write(fd, f"{word}\n".encode())
            heard = b""
            deadline = time.monotonic() + PATIENCE
            while f"GOT {word}".encode() not in heard:
                if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                    return False
                if not (some := os.read(fd, 4096)):
                    return False  # its QEMU has hung up
                heard += some
            return True
        finally:
            os.close(fd)
