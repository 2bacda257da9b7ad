"""Descriptors that a transit inherits: those of the source's taps, and files that it appends to."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import PurePosixPath

from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import QemuProcess

from ..guest import emulator
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
        A file of the source's, as it is called in its mount namespace. We are root, and QEMU's user may have put
        another file there: so it must be one that the source has open for writing, or (where virtlogd writes it) one
        that nobody but root can replace.
        """
        if not PurePosixPath(path).is_absolute():
            raise Untransitable(f"{path} is relative to a directory that is not known")
        try:
            found = os.open(f"/proc/{self._source.pid}/root{path}", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                self._verify(path, os.fstat(found))
                number = os.open(f"/proc/self/fd/{found}", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            finally:
                os.close(found)
        except OSError as err:
            raise Untransitable(f"{path} cannot be opened: {err.strerror}") from err
        self.numbers.append(number)
        return number

    def _verify(self, path: str, file: os.stat_result) -> None:
        if not stat.S_ISREG(file.st_mode):
            raise Untransitable(f"{path} is no regular file")
        if not self._written_by_source(file) and (who := _who_else(path, file)):
            raise Untransitable(f"{path} is not a file that the old QEMU has open, and {who}")

    def _written_by_source(self, file: os.stat_result) -> bool:
        for descriptor in self._source.descriptors():
            with contextlib.suppress(OSError):
                flags = self._flags(descriptor.number)
                same = os.path.samestat(os.stat(f"/proc/{self._source.pid}/fd/{descriptor.number}"), file)
                if same and flags & os.O_ACCMODE in (os.O_WRONLY, os.O_RDWR):
                    return True
        return False

    def _flags(self, number: int) -> int:
        """As open(2) has them."""
        return int(self._source.descriptor_info(number).get("flags", "0"), 8)

    def close(self) -> None:
        """Close them here."""
        while self.numbers:
            os.close(self.numbers.pop())


def _who_else(path: str, file: os.stat_result) -> str:
    """Who besides root could have put another file in place of one; empty when nobody could."""
    try:
        who = emulator.untrusted_writer(path)
        return who or ("" if os.path.samestat(file, os.stat(path)) else "it is another one outside its namespace")
    except OSError as err:
        return f"it cannot be examined ({err.strerror})"


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
