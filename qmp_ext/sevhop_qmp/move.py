"""
The move of the SEV context: one call, the errno that it returns, and what each errno means.

``x-sev-migrate-from`` performs ``KVM_ENABLE_CAP(KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM)`` inside the destination and
returns the errno. **Success is the point of no return of a hop**: the source VM is dead from then on.

:data:`ERRNOS` is the only table of these errors in the project. It follows ``sev_vm_move_enc_context_from``
in arch/x86/kvm/svm/sev.c and Documentation/virt/kvm/api.rst.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import tenacity

from . import adopt, misc_cgroup
from .errors import MonitorError, MoveError, MoveUncertain
from .monitor import Monitor

log = logging.getLogger(__name__)

#: Name under which the source's VM descriptor is passed. It belongs to the one monitor used.
FD_NAME = "sevhop-source-vm"


class MoveErrno(NamedTuple):
    """
    What one errno of the move means.

    :ivar retry: whether the same call may succeed a moment later.
    :ivar hint: what an administrator can do.
    """

    number: int
    meaning: str
    retry: bool
    hint: str = ""

    @property
    def name(self) -> str:
        """The symbolic name, such as ``EBUSY``."""
        return errno.errorcode.get(self.number, str(self.number))


#: What each errno of KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM means, and whether it passes.
ERRNOS: Mapping[int, MoveErrno] = {
    row.number: row
    for row in (
        MoveErrno(
            errno.EBUSY,
            "one of the two VMs is in another migration, has a vCPU being created, or no SEV ASID is left",
            retry=True,
            hint="find out what else migrates this guest; see misc.max and misc.current of its cgroup",
        ),
        MoveErrno(errno.EINTR, "the wait for a lock of the VM was interrupted", retry=True, hint="try again"),
        MoveErrno(
            errno.EINVAL,
            "the old QEMU has no SEV context (any more), the new one has one already, or the two VMs do not "
            "match (VM type, number of SEV-ES vCPUs, VMSA)",
            retry=False,
            hint="compare the sev-guest objects and the vCPU counts of both QEMUs",
        ),
        MoveErrno(
            errno.EBADF,
            "the descriptor that was passed is not that of a KVM VM",
            retry=False,
            hint="this is a bug in sevhop: report it",
        ),
        MoveErrno(
            errno.EIO,
            "the VM of the new QEMU is dead because its context was moved away, or the wrong process called",
            retry=False,
            hint="this is a bug in sevhop: report it",
        ),
        MoveErrno(
            errno.ENOMEM, "the kernel is out of memory", retry=False, hint="free memory on the host, then try again"
        ),
        MoveErrno(
            errno.ENOTTY, "this kernel cannot move a SEV context", retry=False, hint="Linux 5.16 or later is needed"
        ),
        MoveErrno(
            errno.EOPNOTSUPP,
            "a VM made by KVM_SEV_INIT2 cannot run after a move",
            retry=False,
            hint="start the guest with legacy-vm-type=on on its sev-guest object",
        ),
    )
}


def explain(number: int) -> MoveErrno:
    """The row of :data:`ERRNOS` for an errno; an unknown one is never retried."""
    return ERRNOS.get(number, MoveErrno(number, os.strerror(number).lower(), retry=False))


@dataclass(frozen=True)
class MoveReport:
    """
    How the move went.

    :ivar attempts: calls made.
    :ivar errno: the last one's errno, 0 when the context was moved.
    :ivar ms: milliseconds for all attempts.
    :ivar restore_errno: not 0 when the context was moved but vCPU registers could not be set afterwards.
    """

    attempts: int
    errno: int
    ms: float
    restore_errno: int = 0


def _is_transient(result: adopt.MoveResult) -> bool:
    return result.errno != 0 and explain(result.errno).retry


async def move(
    destination: Monitor,
    destination_pid: int,
    source_vm_fd: int,
    *,
    deadline: float = 2.0,
    tried: Callable[[int, int], None] = lambda *_: None,
) -> MoveReport:
    """
    Move the SEV context of the VM behind ``source_vm_fd`` into the destination.

    EBUSY and EINTR are retried, with exponential backoff and jitter from 1 ms on, until ``deadline`` seconds have
    passed: the guest is paused meanwhile. Everything else is final at once.

    :param tried: called with the number of each attempt, counted from 1, and its errno.
    :raises MoveError: the context was not moved; the source still owns it.
    :raises CommandError: the destination is not in a state to do this.
    :raises MoveUncertain: the destination did not answer the call. Whether the context was moved is *unknown*.
    :raises MonitorError: it had exited before; the context was not moved.
    """
    began = time.monotonic()
    attempts = 0

    async def attempt() -> adopt.MoveResult:
        nonlocal attempts
        attempts += 1
        await destination.send_fd(FD_NAME, source_vm_fd)
        try:
            result = await adopt.move_from(destination, FD_NAME)
        except MonitorError as err:
            raise MoveUncertain(err.message) from err
        log.info("move attempt %d: %s", attempts, explain(result.errno).name if result.errno else "moved")
        tried(attempts, result.errno)
        return result

    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_result(_is_transient),
        wait=tenacity.wait_exponential(multiplier=0.001, max=0.1) + tenacity.wait_random(0, 0.001),
        stop=tenacity.stop_after_delay(deadline),
        # Out of time: return the last result.
        retry_error_callback=lambda state: state.outcome.result() if state.outcome else None,
    )
    result: adopt.MoveResult = await retrying(attempt)
    report = MoveReport(attempts, result.errno, (time.monotonic() - began) * 1e3, result.restore_errno)
    if result.errno:
        raise _failure(report, destination_pid)
    return report


def _failure(report: MoveReport, destination_pid: int) -> MoveError:
    row = explain(report.errno)
    message = f"the kernel did not move the SEV context: {row.name}, {row.meaning}"
    if row.retry:
        message += f"; given up after {report.attempts} attempts in {report.ms / 1e3:.1f} s"
    hint = row.hint
    if report.errno == errno.EBUSY and (full := misc_cgroup.find_full(destination_pid)):
        hint = f"no SEV ASID is left: {full}; raise misc.max"
    return MoveError(message, report.errno, hint)
