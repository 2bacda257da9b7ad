"""What sevhop writes to the journal of systemd, which a daemon of the tests does not have."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from sevhop.observe import journald

from tests.support.guests.daemon import Daemon


@contextmanager
def journal(daemon: Daemon) -> Iterator[list[str]]:
    """A socket in the place of systemd-journald. :return: the records, complete after the context."""
    path = daemon.root / str(journald.SOCKET).lstrip("/")
    path.parent.mkdir(parents=True)
    records: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(path))

        def read() -> None:
            while record := listener.recv(1 << 16):
                records.append(record.decode())

        reader = threading.Thread(target=read)
        reader.start()
        try:
            yield records
        finally:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
                last.sendto(b"", str(path))
            reader.join()
            path.unlink()
            path.parent.rmdir()
