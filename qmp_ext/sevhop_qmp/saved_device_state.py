"""
The device state of a source that exits before its destination starts: saved in memory, in the form that a destination
loads. See :mod:`sevhop_qmp.device_state` for what is missing in what the source writes.
"""

from __future__ import annotations

import contextlib
import os

from . import selinux
from .device_state import EMPTY_DESCRIPTION, MAGIC, STATE_TIMEOUT, cannot_save, header, no_state
from .errors import CommandError, MonitorError
from .monitor import Commands


class SavedDeviceState:
    """
    A memfd that is passed to the source, which writes its state there.

    :meth:`arm` while the guest runs, :meth:`save` once it has stopped.
    """

    def __init__(self, source: Commands, machine_type: str) -> None:
        self._source = source
        self._header = header(machine_type)
        self._file = -1
        self._fdset: int | None = None

    async def __aenter__(self) -> SavedDeviceState:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.disarm(self._source)
        if self._file >= 0:
            os.close(self._file)

    async def arm(self) -> None:
        """:raises CommandError, MonitorError: the source refuses, or does not answer."""
        self._file = os.memfd_create("sevhop-device-state", os.MFD_CLOEXEC)
        selinux.share(self._file)
        # QEMU opens a descriptor of an fd set only in exactly the mode that it has.
        write_end = os.open(f"/proc/self/fd/{self._file}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            self._fdset, _ = await self._source.add_fd(write_end)
        finally:
            os.close(write_end)

    async def disarm(self, source: Commands) -> None:
        """Remove the file from the source, through any of its monitors."""
        if self._fdset is not None:
            with contextlib.suppress(MonitorError, CommandError):
                await source.execute("remove-fd", {"fdset-id": self._fdset})
                self._fdset = None

    def source_ended(self) -> None:
        """There is nothing to remove any more; the domain's monitor will be another QEMU's."""
        self._fdset = None

    async def save(self, *, release_images: bool = True, timeout: float = STATE_TIMEOUT) -> bytes:
        """
        Have the stopped source write its state.

        :param release_images: afterwards it has given up its disk images; ``cont`` takes them back.
        :return: what a destination loads.
        :raises StateError: the source could not save, or what it wrote is not a device state.
        :raises MonitorError: the source has exited, or does not answer.
        """
        arguments = {"filename": f"/dev/fdset/{self._fdset}", "live": release_images}
        try:
            await self._source.execute("xen-save-devices-state", arguments, timeout=timeout)
        except CommandError as err:
            raise cannot_save(err) from err
        written = os.pread(self._file, os.fstat(self._file).st_size, 0)
        return complete(written, self._header)


def complete(written: bytes, beginning: bytes) -> bytes:
    """
    What a destination loads, from what a source wrote.

    :param beginning: the :func:`.device_state.header` for its machine type.
    :raises StateError: that is no device state.
    """
    if not written.startswith(MAGIC):
        raise no_state(written)
    return beginning + written[len(MAGIC) :] + EMPTY_DESCRIPTION
