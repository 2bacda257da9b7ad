"""
How a hop can end other than well. The class decides the exit status; the error itself has the state of the guest.

::

    SevhopError                 (sevhop_qmp.errors, the root of everything raised on purpose)
    └── HopError                carries ``guest_state``
        ├── Refused             1: nothing was touched
        ├── RolledBack          3: failed, and the guest is in its old QEMU as before, or where another client put it
        │   └── Interrupted     3: somebody asked for it
        ├── RecoveryRequired    4: nothing of the guest is lost, but ``sevhop recover`` or a person must act
        └── GuestLost           5: the guest is gone, though not by the hop: its QEMU exited before its state was saved
"""

from __future__ import annotations

import enum

from sevhop_qmp.errors import SevhopError


class GuestState(enum.Enum):
    """Where the guest is and whether it runs, in words that follow "the guest is"."""

    UNTOUCHED = "untouched"
    RUNNING_IN_OLD = "running in the old QEMU"
    PAUSED_IN_OLD = "paused in the old QEMU"
    RUNNING_IN_NEW = "running in the new QEMU"
    PAUSED_IN_NEW = "paused in the new QEMU"
    SUSPENDED = "suspended in the keeper"
    IN_TRANSIT = "running in the transit"
    SAVED = "saved to disk by another client"
    GONE = "gone"
    UNKNOWN = "in an unknown state"


#: What to do with a guest that is ``GONE``.
LOST_HINT = "start the guest, as after a crash"
#: What to do with a guest that is ``SAVED``.
SAVED_HINT = "resume the guest with virsh restore of that image, or virsh start after virsh managedsave"


class HopError(SevhopError):
    """
    A hop did not end well.

    :ivar guest_state: what has become of the guest.
    """

    guest_state = GuestState.UNKNOWN

    def __init__(self, message: str, hint: str = "", guest_state: GuestState | None = None) -> None:
        super().__init__(message, hint)
        if guest_state is not None:
            self.guest_state = guest_state


class Refused(HopError):
    """The hop must not be tried. Nothing of the guest was touched."""

    guest_state = GuestState.UNTOUCHED


class RolledBack(HopError):
    """
    The hop failed before its commit, and was rolled back. A guest that another client has saved to disk meanwhile
    is that client's to resume: nothing is left to do for ``sevhop recover``.
    """

    guest_state = GuestState.RUNNING_IN_OLD


class Interrupted(RolledBack):
    """Somebody asked for the hop to be rolled back while that was possible, and it was."""


class RecoveryRequired(HopError):
    """Nothing of the guest is lost, but it is not where it should be, or does not run."""


class GuestLost(HopError):
    """The guest is gone: its QEMU exited while a hop was prepared, or all that had it did."""

    guest_state = GuestState.GONE
