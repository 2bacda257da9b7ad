"""
Where the SEV context is, and its move into the destination.

The context is in one VM at a time, and any process may be killed during the move. So the destination's VM is duplicated
and stored before it: afterwards the context is in one of the VMs that the keeper, or its successor, has. The guest
survives if that QEMU is killed before it runs.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence

from sevhop_qmp import move
from sevhop_qmp.errors import MonitorError, MoveError, SevhopError
from sevhop_qmp.monitor import Monitor
from sevhop_qmp.process import QemuProcess

from .config import KeeperError

#: The VM that was taken from the source: all keepers inherit it from the supervisor.
_SOURCE_VM = "source"


class ContextVms:
    """
    The VMs that may have the context, in the order in which they are tried.

    :param source_vm_fd: None under TCG.
    :param checkpoint: stores the state of the keeper, with these VMs.
    :ivar report: how the last move went.
    """

    def __init__(self, source_vm_fd: int | None, checkpoint: Callable[[], None]) -> None:
        self._vms: dict[str, int] = {} if source_vm_fd is None else {_SOURCE_VM: source_vm_fd}
        self._checkpoint = checkpoint
        self.report: move.MoveReport | None = None

    @property
    def names(self) -> list[str]:
        """Of the VMs, in their order."""
        return list(self._vms)

    def descriptors(self) -> dict[str, int]:
        """For a checkpoint: those that a successor does not have."""
        return {name: fd for name, fd in self._vms.items() if name != _SOURCE_VM}

    def restore(self, names: Sequence[str], descriptors: Mapping[str, int]) -> None:
        """Have the VMs of a checkpoint."""
        self._vms = {name: (self._vms | dict(descriptors))[name] for name in names}

    async def move_to(self, monitor: Monitor, destination: QemuProcess, deadline: float) -> None:
        """
        Move the context, and keep the VM that has it then.

        :param deadline: seconds for which a move that is refused as busy is retried.
        :raises MoveError: it was not moved.
        :raises MonitorError: the destination exited, maybe during the move. The next attempt finds out which VM has the
            context.
        :raises KeeperError: there is no VM, or the destination has the context and cannot run with it.
        """
        descriptor = destination.vm_descriptor()
        if descriptor is None or not self._vms:
            which = "new" if descriptor is None else "old"
            raise KeeperError(f"cannot move the SEV context: the {which} QEMU has no KVM VM", "run both with accel=kvm")
        before = dict(self._vms)
        name = next(name for number in itertools.count(1) if (name := f"vm {number}") not in before)
        self._vms[name] = destination.duplicate(descriptor)
        self._checkpoint()
        try:
            self.report = await _move_from(before, monitor, destination, deadline)
        except MonitorError:
            raise
        except SevhopError:
            self._forget([name])
            raise
        self._forget(before)
        if self.report.restore_errno:
            reason = os.strerror(self.report.restore_errno)
            raise KeeperError(
                f"the context was moved, but vCPU registers could not be set: {reason}",
                "the guest cannot run any more: shut it down, start it again, and report this",
            )

    def _forget(self, names: Iterable[str]) -> None:
        for name in names:
            os.close(self._vms.pop(name))
        self._checkpoint()


async def _move_from(
    vms: Mapping[str, int], monitor: Monitor, destination: QemuProcess, deadline: float
) -> move.MoveReport:
    """From the first of these VMs that has the context. One that has none any more fails with EINVAL, or EIO."""
    failure = MoveError("cannot move the SEV context: no VM has it", errno.EINVAL)
    for vm in vms.values():
        try:
            return await move.move(monitor, destination.pid, vm, deadline=deadline)
        except MoveError as err:
            if err.errno not in (errno.EINVAL, errno.EIO):
                raise
            failure = err
    raise failure
