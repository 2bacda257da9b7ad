"""Pings to a guest, sent in the network of a daemon by the program ``pinging.py``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.guests.daemon import Daemon
from tests.support.guests.running import GuestFailed

_PROGRAM = Path(__file__).with_name("pinging.py")
#: ms between two pings.
PERIOD = 5
_TIMEOUT = 60.0


class Pings:
    """
    Pings an address until :meth:`stop`. A context manager, entered when the first ping was answered.

    :ivar sent: how many; known at the end.
    :ivar lost: those that were never answered.
    """

    def __init__(self, daemon: Daemon, address: str) -> None:
        self.sent = 0
        self.lost = 0
        self._address = address
        self._process = daemon.start_command(sys.executable, _PROGRAM, address, str(PERIOD))

    def __enter__(self) -> Self:
        assert self._process.stdout is not None
        # It ends when the process does.
        if self._process.stdout.readline().strip() != "answered":
            _, err = self._process.communicate()
            raise GuestFailed(f"{self._address} cannot be pinged: {err.strip()}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def stop(self) -> None:
        """
        Send no more, and count.

        :raises GuestFailed: they could not be counted.
        """
        self._process.terminate()
        try:
            out, err = self._process.communicate(timeout=_TIMEOUT)
        except subprocess.TimeoutExpired as late:
            raise GuestFailed(f"pings to {self._address} are not counted in time") from late
        if self._process.returncode:
            raise GuestFailed(f"pings to {self._address} are not counted: {err.strip()}")
        counted = json.loads(out)
        self.sent, self.lost = counted["sent"], counted["lost"]
