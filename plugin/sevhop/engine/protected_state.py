"""
Has the source of an SEV-ES guest save all vCPU state, and remembers that for a rollback.

The flag that is cleared for it (:mod:`sevhop_qmp.protected_state`) is in the source's memory. The journal has its
offset from the beginning, so that ``sevhop recover`` can set it again. In the destination adopt.so does the same.

While the flag is cleared QEMU would reset the guest when that reboots, and go on with a guest whose registers it cannot
set. So before that the source's action on a reboot becomes ``shutdown``: what QEMU before 11.0 does with such a guest
anyway. A rollback sets the former one again; the journal has it, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from sevhop_qmp import protected_state
from sevhop_qmp.errors import ProcessError, SevhopError, StateError
from sevhop_qmp.monitor import Commands
from sevhop_qmp.process import QemuProcess
from sevhop_qmp.protected_state import ProtectedState

from ..guest import runtime_settings
from .transaction import Transaction

_SHUTDOWN = "shutdown"


async def forbid_resets(hop: Transaction, monitor: Commands, source: QemuProcess, offset: int) -> None:
    """
    Have the source shut down when its guest reboots, until a rollback.

    :param offset: of the flag; 0 if the source has none, or needs none.
    :raises SevhopError: the source has exited, or refuses.
    """
    action = runtime_settings.actions(source).get("reboot", "") if offset else ""
    if action in ("", _SHUTDOWN):
        return

    async def allow() -> None:
        if source.alive:  # libvirt's monitor of a domain would lead to another QEMU
            await set_reboot_action(monitor, action)

    hop.record(reboot_action=action)
    hop.rollback.push(allow)
    await monitor.execute("set-action", {"reboot": _SHUTDOWN})


async def set_reboot_action(monitor: Commands, action: str) -> None:
    """
    Undo :func:`forbid_resets` in a source that still exists.

    :param action: as the journal has it; empty if there is nothing to be undone.
    """
    if action:
        with contextlib.suppress(SevhopError):
            await monitor.execute("set-action", {"reboot": action})


def open_flag(hop: Transaction, source: QemuProcess, offset: int) -> ProtectedState | None:
    """
    Open the flag while the guest runs.

    :param offset: of the flag; 0 if the source has none, or needs none.
    :return: it, until the end of the hop; None if there is none.
    :raises StateError: it is not set any more.
    """
    return hop.resources.enter_context(_opened(source, offset)) if offset else None


def clear(hop: Transaction, flag: ProtectedState | None) -> None:
    """
    Have the source save all vCPU state from now on, until it exits or the hop is rolled back.

    :raises ProcessError: it has exited.
    """
    if flag is None:
        return

    def restore() -> None:
        with contextlib.suppress(ProcessError):  # it has exited
            flag.restore()

    hop.rollback.push(restore)
    flag.clear()


@contextlib.contextmanager
def cleared(source: QemuProcess, offset: int) -> Iterator[None]:
    """
    Have the source save all vCPU state meanwhile.

    :param offset: of the flag; 0 if the source has none, or needs none.
    :raises StateError: it is not set any more.
    """
    if not offset:
        yield
        return
    with _opened(source, offset) as flag:
        flag.clear()
        try:
            yield
        finally:
            with contextlib.suppress(ProcessError):  # it has exited
                flag.restore()


def restore(source: QemuProcess | None, offset: int) -> None:
    """
    Set the flag again that an interrupted hop may have cleared.

    :param source: None if it has exited.
    :param offset: as the journal has it.
    """
    if source is not None and offset:
        with contextlib.suppress(SevhopError):  # it has exited
            protected_state.restore(source, offset)


def _opened(source: QemuProcess, offset: int) -> ProtectedState:
    flag = ProtectedState(source, offset)
    if flag.protected() != 1:
        flag.close()
        raise StateError("the source's flag guest_state_protected is not set any more", "try again")
    return flag
