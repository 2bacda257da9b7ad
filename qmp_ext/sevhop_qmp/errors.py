"""
Everything that sevhop raises on purpose, under one root.

::

    SevhopError                 has a message, and a hint: what to do next
    ├── MonitorError            the monitor cannot be used: no socket, not QMP, in use by another client
    │   ├── MonitorClosed       QEMU exited, or closed the connection, in the middle of the conversation
    │   ├── MonitorTimeout      QEMU did not answer within the time allowed
    │   └── MoveUncertain       there was no answer to the move of the SEV context: it may have been moved, or not
    ├── CommandError            QEMU answered with an error; its own words are the message
    ├── ProcessError            a QEMU process has exited, or cannot be inspected
    ├── RamError                guest memory is not laid out as a hop needs it
    ├── StateError              device state could not be saved or loaded
    └── MoveError               the kernel did not move the SEV context; has the errno

Foreign exceptions (QMPError, OSError) are translated where they arise and stay reachable as ``__cause__``.
"""

from __future__ import annotations


class SevhopError(Exception):
    """
    Root of all errors raised on purpose.

    :param message: what failed, in one line, without a full stop.
    :param hint: what the reader can do about it; empty when there is nothing to advise.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class MonitorError(SevhopError):
    """The QMP monitor cannot be used."""


class MonitorClosed(MonitorError):
    """The QEMU behind the monitor exited, or closed the connection."""


class MonitorTimeout(MonitorError):
    """QEMU did not answer in time; it may still execute the command."""


class MoveUncertain(MonitorError):
    """The destination did not answer the move of the SEV context. Whether it was moved is unknown."""


class CommandError(SevhopError):
    """
    QEMU refused a command.

    :param command: the QMP command.
    :param desc: QEMU's description, unchanged.
    :param error_class: the QMP error class, ``GenericError`` for almost all.
    """

    def __init__(self, command: str, desc: str, error_class: str = "GenericError") -> None:
        super().__init__(f"{command}: {desc}")
        self.command = command
        self.desc = desc
        self.error_class = error_class


class ProcessError(SevhopError):
    """A process has exited, cannot be inspected, or is not the QEMU that it should be."""


class RamError(SevhopError):
    """The RAM blocks of source and destination do not fit together, or cannot be read."""


class StateError(SevhopError):
    """The device state could not be saved by the source or loaded by the destination."""


class MoveError(SevhopError):
    """
    The kernel did not move the SEV context. The source still owns it.

    :param errno: the kernel's error number.
    """

    def __init__(self, message: str, errno: int, hint: str = "") -> None:
        super().__init__(message, hint)
        self.errno = errno
