"""
The device state of a source that ends before its destination starts: kept in memory, in the form in which a destination
loads it. See :mod:`sevhop_qmp.device_state` for what is missing in what the source writes.
"""

from __future__ import annotations

import contextlib
import os

from .device_state import EMPTY_DESCRIPTION, MAGIC, STATE_TIMEOUT, head, no_state
from .errors import CommandError, MonitorError, StateError
from .monitor import Commands


class KeptState:
    """
    A file in memory that the source has been given, to write its state to.

    :meth:`arm` while the guest runs, :meth:`save` once it has stopped.
    """

    def __init__(self, source: Commands, machine_type: str) -> None:
        self._source = source
        self._head = head(machine_type)
        self._file = -1
        self._fdset: int | None = None

    async def __aenter__(self) -> KeptState:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.take_back(self._source)
        if self._file >= 0:
            os.close(self._file)

    async def arm(self) -> None:
        """:raises CommandError, MonitorError: the source does not play along."""
        self._file = os.memfd_create("sevhop-device-state", os.MFD_CLOEXEC)
        # QEMU opens a descriptor of an fd set only in the very mode that it has.
        write_end = os.open(f"/proc/self/fd/{self._file}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            self._fdset, _ = await self._source.add_fd(write_end)
        finally:
            os.close(write_end)

    async def take_back(self, source: Commands) -> None:
        """Take the file back from the source, by way of any of its monitors."""
        if self._fdset is not None:
            with contextlib.suppress(MonitorError, CommandError):
                await source.execute("remove-fd", {"fdset-id": self._fdset})
                self._fdset = None

    def source_ended(self) -> None:
        """There is nothing to take back from it any more; the domain's monitor will be another QEMU's."""
        self._fdset = None

    async def save(self, *, release_images: bool = True, timeout: float = STATE_TIMEOUT) -> bytes:
        """
        Have the stopped source write its state.

        :param release_images: afterwards it has given up its disk images; ``cont`` takes them back.
        :return: what a destination loads.
        :raises StateError: the source could not save, or what it wrote is not a device state.
        :raises MonitorError: the source is gone or silent.
        """
        arguments = {"filename": f"/dev/fdset/{self._fdset}", "live": release_images}
        try:
            await self._source.execute("xen-save-devices-state", arguments, timeout=timeout)
        except CommandError as err:
            raise StateError(f"the source cannot save its device state: {err.desc}") from err
        written = os.pread(self._file, os.fstat(self._file).st_size, 0)
        return complete(written, self._head)


def complete(written: bytes, beginning: bytes) -> bytes:
    """
    What a destination loads, from what a source wrote.

    :param beginning: the :func:`.device_state.head` for its machine type.
    :raises StateError: that is no device state.
    """
    if not written.startswith(MAGIC):
        raise no_state(written)
    return beginning + written[len(MAGIC) :] + EMPTY_DESCRIPTION
