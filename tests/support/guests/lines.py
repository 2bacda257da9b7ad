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
#: Seconds after which a word is sent again. The guest may read it from a virtio port before it hears that the port is
#: connected, which comes over another queue; then it cannot answer, and does not wait.
_AGAIN = 10.0


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
            heard = b""
            deadline, again = time.monotonic() + PATIENCE, 0.0
            while f"GOT {word}".encode() not in heard:
                if (now := time.monotonic()) > deadline:
                    return False
                if now >= again:
                    os.write(fd, f"{word}\n".encode())
                    again = now + _AGAIN
                if not select.select([fd], [], [], again - now)[0]:
                    continue
                if not (some := os.read(fd, 4096)):
                    return False  # its QEMU has hung up
                heard += some
            return True
        finally:
            os.close(fd)
