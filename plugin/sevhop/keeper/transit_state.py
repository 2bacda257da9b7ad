"""
How far the guest of a domain has come that waits for libvirt in the transit, where it runs. Decisions only.

::

    transit ──restore begin──> restoring ──libvirt has accepted the destination──> met ──> hopping ──> over
       ^                           │                                                │         │
       ├───────────────────────────┴──────────── any failure ───────────────────────┴─────────┘
       └──the guest is off──> ended

Nothing that libvirt's hook does lets the guest run anywhere. Whatever libvirt and other hooks do, the guest is in the
transit until libvirt has accepted the destination, and the keeper has it hop after that.
"""

from __future__ import annotations

import enum

from .state import HookAction


class TransitState(enum.Enum):
    """
    How far the guest has come.

    ``TRANSIT``
        it runs in the transit, and libvirt has no QEMU of the domain
    ``RESTORING``
        the same, and libvirt starts a destination
    ``MET``
        the same, and libvirt has accepted the destination
    ``HOPPING``
        it is stopped, and hops from the transit into the destination
    ``OVER``
        it is in the destination
    ``ENDED``
        it was switched off in the transit, or was ended there
    """

    TRANSIT = "transit"
    RESTORING = "restoring"
    MET = "met"
    HOPPING = "hopping"
    OVER = "over"
    ENDED = "ended"


#: Nothing is kept for the domain any more.
FINISHED = frozenset({TransitState.OVER, TransitState.ENDED})

#: The reason if somebody has ended a restore, who knows more about it.
RESTORE_ENDED = "the restore was ended"

_RECOVER = "run: sevhop recover"
#: Steps at which a domain is started that is not being restored.
_COLD_STARTS = frozenset({("prepare", "cold-start"), ("migrate", "begin")})
_STARTS = _COLD_STARTS | {("prepare", "begin"), ("restore", "begin"), ("restore", "another")}


def at_hook(
    state: TransitState,
    operation: str,
    sub: str,
    *,
    own: bool,
    restoring: bool,
    connected: bool,
    uuid: str,
    image: object,
) -> tuple[HookAction, str]:
    """
    What to do at a step of a domain, and why it is refused if it is.

    :param own: whether it is the domain whose guest is in the transit; ``uuid`` is that one's.
    :param restoring: a restore of it is in progress that may yet succeed.
    :param connected: the QEMU that libvirt has started for it has asked for the guest.
    """
    step = (operation, sub)
    if state in FINISHED:
        return (HookAction.ALLOW if own else HookAction.IGNORE), ""
    if not own:
        reason = f"cannot start the domain: a hop has reserved its name for the domain with UUID {uuid}; {_RECOVER}"
        return (HookAction.REFUSE, reason) if step in _STARTS else (HookAction.IGNORE, "")
    if step == ("restore", "begin"):
        if restoring:
            return HookAction.REFUSE, f"cannot restore the guest: it is being restored already; wait, or {_RECOVER}"
        return HookAction.BEGIN_RESTORE, ""
    if step == ("restore", "another"):
        reason = "cannot restore the domain from this image: its guest runs in the transit"
        return HookAction.REFUSE, f"{reason}; run: virsh restore {image}"
    expected = state is TransitState.RESTORING
    if step in _COLD_STARTS or (step == ("prepare", "begin") and not expected):
        return HookAction.REFUSE, f"cannot start the domain: its guest runs in the transit; run: virsh restore {image}"
    if step == ("started", "begin") and not expected:
        return HookAction.REFUSE, f'cannot restore the guest: the keeper is in state "{state.value}"; try again'
    if step == ("started", "begin") and not connected:
        # Whatever it has loaded is not this guest.
        return HookAction.REFUSE, f"cannot start this QEMU: its guest runs in the transit; run: virsh restore {image}"
    return HookAction.ALLOW, ""


def reason_against_request(state: TransitState, request: str) -> str:
    """Against a request of the command that is known, but impossible now."""
    return f'cannot {request}: the keeper is in state "{state.value}"; see: sevhop status'
