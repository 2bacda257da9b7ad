"""
A program: pings an address at a fixed rate, and counts the pings that are never answered.

``pinging.py ADDRESS MS`` sends one each MS milliseconds until SIGTERM. It prints ``answered`` at the first answer; at
the end, a second after the last ping or when all are answered, one JSON object with ``sent`` and ``lost``. It runs with
a realtime priority, so that it sends them in time on a busy host as well.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import struct
import sys
import time

#: Seconds in which the last ping may be answered.
_PATIENCE = 1.0
_PRIORITY = 40
#: Type, code, checksum, identifier, sequence number (RFC 792); the data is the number of the ping.
_HEADER = struct.Struct("!BBHHH")
_NUMBER = struct.Struct("!Q")
_REQUEST, _REPLY = 8, 0


class Pings:
    """
    Pings from one raw socket.

    :ivar sent: how many.
    :ivar answered: how many of them, each once.
    """

    def __init__(self, address: str) -> None:
        self.sent = 0
        self.answered = 0
        self._address = address
        self._identifier = os.getpid() & 0xFFFF
        self._open: set[int] = set()
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        self._socket.setblocking(False)

    def send(self) -> None:
        """One more. What cannot be sent is lost."""
        data = _NUMBER.pack(self.sent)
        header = (_REQUEST, 0, 0, self._identifier, self.sent & 0xFFFF)
        checked = _checksum(_HEADER.pack(*header) + data)
        with contextlib.suppress(OSError):
            self._socket.sendto(_HEADER.pack(*header[:2], checked, *header[3:]) + data, (self._address, 0))
        self._open.add(self.sent)
        self.sent += 1

    def receive(self, seconds: float) -> None:
        """Take answers for so long."""
        end = time.monotonic() + seconds
        while select.select([self._socket], [], [], max(0.0, end - time.monotonic()))[0]:
            packet = self._socket.recv(2048)
            message = packet[(packet[0] & 15) * 4 :]
            if len(message) < _HEADER.size + _NUMBER.size:
                continue
            kind, _, _, identifier, _ = _HEADER.unpack_from(message)
            (number,) = _NUMBER.unpack_from(message, _HEADER.size)
            if (kind, identifier) == (_REPLY, self._identifier) and number in self._open:
                self._open.remove(number)
                self.answered += 1


def _checksum(data: bytes) -> int:
    """Of an even number of bytes (RFC 1071)."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def main(address: str, period: float) -> None:
    """
    Ping until SIGTERM.

    :param period: seconds.
    """
    ended = False

    def end(number: int, frame: object) -> None:
        nonlocal ended
        ended = True

    signal.signal(signal.SIGTERM, end)
    pings = Pings(address)
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(_PRIORITY))
    following = time.monotonic()
    while not ended:
        pings.send()
        following += period
        before = pings.answered
        pings.receive(following - time.monotonic())
        if not before and pings.answered:
            print("answered", flush=True)
    deadline = time.monotonic() + _PATIENCE
    while pings.answered < pings.sent and (left := deadline - time.monotonic()) > 0:
        pings.receive(min(left, period))
    print(json.dumps({"sent": pings.sent, "lost": pings.sent - pings.answered}))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]) / 1e3)
