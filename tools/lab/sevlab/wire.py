"""What the lab and the machine say to each other, over one virtio-serial port.

The lab sends frames: one byte for the kind, four for the length (big-endian), then the payload. The machine sends
nothing: it ends the lab by ending its QEMU.
"""

from __future__ import annotations

import os
import struct

# The lab's process 1 imports this module: what is imported here is paid for in emulation, at every start.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

UP = b"u"  # the command is about to start; no payload
OUT = b"o"  # from the command's stdout
ERR = b"e"  # from the command's stderr
EXIT = b"x"  # the command has ended; payload: its status, decimal
FAILED = b"f"  # the lab failed inside; payload: why

_HEADER = struct.Struct(">cI")


class Job:
    """What a run is to do.

    :param command: program and arguments. Any bytes but NUL may be in them, as os.fsdecode gives them.
    :param directory: where to start it.
    :param environment: all its variables.
    """

    def __init__(self, command: Sequence[str], directory: str, environment: Mapping[str, str]) -> None:
        self.command = list(command)
        self.directory = directory
        self.environment = dict(environment)

    def to_bytes(self) -> bytes:
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        fields = [self.directory, str(len(variables)), *variables, *self.command]
        return b"\0".join(os.fsencode(field) for field in fields)

    @classmethod
    def from_bytes(cls, data: bytes) -> Job:
        directory, count, *fields = (os.fsdecode(field) for field in data.split(b"\0"))
        variables = (field.split("=", 1) for field in fields[: int(count)])
        return cls(fields[int(count) :], directory, {name: value for name, value in variables})  # noqa: C416


def send(port: int, kind: bytes, payload: bytes = b"") -> None:
    """Write a frame; waits until the machine has taken all of it."""
    data = _HEADER.pack(kind, len(payload)) + payload
    while data:
        data = data[os.write(port, data) :]


class Receiver:
    """Puts frames together from the pieces that arrive."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Kind and payload of each frame that is complete now."""
        self._data += data
        while len(self._data) >= _HEADER.size:
            kind, length = _HEADER.unpack_from(self._data)
            end = _HEADER.size + length
            if len(self._data) < end:
                return
            payload = bytes(self._data[_HEADER.size : end])
            del self._data[:end]
            yield kind, payload
