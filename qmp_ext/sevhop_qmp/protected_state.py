"""
The flag by which a running QEMU remembers that the registers of its SEV-ES guest are protected.

From version 9.1 on QEMU sets it when the guest is launched (``guest_state_protected`` of its ``KVMState``), and neither
reads nor writes any vCPU state from then on. So it would save a device state without what is not among the encrypted
registers: local APIC, MSRs, pending events, MP state. While the flag is cleared it reads and saves them. That does not
disturb a running guest, but lets QEMU believe that the guest can be reset, so it is cleared right before the stop, and
set again if the guest stays where it is.

The flag is a byte in the memory of the QEMU. Where it is, adopt.so finds out in another process of the same program
(``x-sev-adopt-status``). Here it is only read and written.
"""

from __future__ import annotations

import contextlib
import os
import struct
from typing import Self

from . import exported
from .errors import ProcessError
from .process import QemuProcess

#: The pointer to the ``KVMState``, and the function that sets the flag: a QEMU without that has no flag.
_STATE = "kvm_state"
_MARK = "kvm_mark_guest_state_protected"
#: The first version that has it.
_FIRST = (9, 1)
_POINTER = struct.Struct("<Q")


def has_flag(process: QemuProcess, version: str) -> bool:
    """
    Whether a QEMU has the flag.

    :param version: such as ``10.0.13``; decides for a program that does not export its functions.
    :raises ProcessError: the process has exited, or permission is denied.
    """
    major, minor, *_ = (int(part) for part in version.split("."))
    return (major, minor) >= _FIRST or _MARK in exported.addresses(process, [_MARK])


class ProtectedState:
    """
    The flag of one QEMU, which is opened before the guest is stopped: each method is a single system call.

    A context manager; :meth:`close` may be called more than once.
    """

    def __init__(self, process: QemuProcess, offset: int) -> None:
        """
        :param offset: of the flag in the ``KVMState``, bytes.
        :raises ProcessError: the process has exited, has no ``KVMState``, or permission is denied.
        """
        self._exit = contextlib.ExitStack()
        self._pid = process.pid
        pointer = exported.addresses(process, [_STATE]).get(_STATE)
        if pointer is None:
            raise ProcessError(f"process {process.pid} does not export {_STATE}")
        self._memory = self._exit.enter_context(process.memory(write=True))
        try:
            (state,) = _POINTER.unpack(os.pread(self._memory, _POINTER.size, pointer))
            self._address = int(state) + offset
            self.protected()
        except BaseException as err:
            self._exit.close()
            if isinstance(err, (OSError, struct.error, OverflowError)):
                raise ProcessError(f"cannot read the KVMState of process {process.pid}") from err
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the memory of the process."""
        self._exit.close()

    def protected(self) -> int:
        """
        The value of the flag: 1, or 0 if it is cleared. Another one means that this is not the flag.

        :raises ProcessError: the process has exited.
        """
        try:
            return os.pread(self._memory, 1, self._address)[0]
        except (OSError, IndexError) as err:
            raise self._unreachable() from err

    def clear(self) -> None:
        """
        Have QEMU read and save all vCPU state.

        :raises ProcessError: the process has exited.
        """
        self._write(0)

    def restore(self) -> None:
        """
        Undo :meth:`clear`.

        :raises ProcessError: the process has exited.
        """
        self._write(1)

    def _write(self, value: int) -> None:
        try:
            os.pwrite(self._memory, bytes([value]), self._address)
        except OSError as err:
            raise self._unreachable() from err

    def _unreachable(self) -> ProcessError:
        return ProcessError(f"cannot access the KVMState of process {self._pid}")


def restore(process: QemuProcess, offset: int) -> None:
    """
    Set the flag again if a hop that was interrupted has left it cleared.

    :param offset: as that hop has recorded it.
    :raises ProcessError: the process has exited, or permission is denied.
    """
    with ProtectedState(process, offset) as state:
        if state.protected() == 0:
            state.restore()
