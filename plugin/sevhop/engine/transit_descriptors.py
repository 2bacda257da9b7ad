"""Descriptors that a transit inherits: those of the source's taps, and files that it appends to."""

from __future__ import annotations

import os
import stat
from pathlib import PurePosixPath

from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import QemuProcess

from .transit_command_line import Untransitable


class InheritedDescriptors:
    """
    See :class:`.transit_command_line.Descriptors`. They have the same numbers in the transit.

    :ivar numbers: of all.
    """

    def __init__(self, source: QemuProcess) -> None:
        self._source = source
        self.numbers: list[int] = []

    def duplicate(self, number: int) -> int:
        """A duplicate of one of the source's."""
        self.numbers.append(self._source.duplicate(number))
        return self.numbers[-1]

    def appending(self, path: str) -> int:
        """
        A file of the source's, as it is called in its mount namespace. It must be a regular file, and no link: it may
        be in a directory of QEMU's user, and we are root.
        """
        root = f"/proc/{self._source.pid}/root"
        try:
            if not PurePosixPath(path).is_absolute():
                raise Untransitable(f"{path} is relative to a directory that is not known")
            number = os.open(root + path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as err:
            raise Untransitable(f"{path} cannot be opened: {err.strerror}") from err
        self.numbers.append(number)
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise Untransitable(f"{path} is no regular file")
        os.set_blocking(number, True)
        return number

    def close(self) -> None:
        """Close them here."""
        while self.numbers:
            os.close(self.numbers.pop())


def namespaces_to_enter(source: QemuProcess) -> tuple[int, ...]:
    """
    Descriptors of those namespaces of a source that we are not in. libvirt makes a mount namespace for each QEMU.

    :raises SevhopError: it has exited, or has one that a transit cannot enter.
    """
    found: list[int] = []
    for kind in ("pid", "user", "ipc", "uts", "cgroup", "net", "mnt"):
        if source.namespace(kind) == os.readlink(f"/proc/self/ns/{kind}"):
            continue
        if kind not in ("net", "mnt"):
            for descriptor in found:
                os.close(descriptor)
            raise Untransitable(f"its QEMU is in another {kind} namespace")
        try:
            found.append(os.open(f"/proc/{source.pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC))
        except OSError as err:
            raise SevhopError(f"cannot enter the {kind} namespace of process {source.pid}: {err.strerror}") from err
    return tuple(found)
