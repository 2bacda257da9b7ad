"""
What libvirt's hook is answered while the guest of a domain runs in the transit. Decisions only.

Nothing that the hook does lets the guest run anywhere: whatever libvirt and other hooks do, the guest is in the transit
until libvirt has accepted the destination, and the keeper hops after that.
"""

from __future__ import annotations

from .state import FINISHED, HookAction, State

_RECOVER = "run: sevhop recover"
#: Steps at which a domain is started that is not being restored.
_COLD_STARTS = frozenset({("prepare", "cold-start"), ("migrate", "begin")})
_STARTS = _COLD_STARTS | {("prepare", "begin"), ("restore", "begin")}


def at_hook(
    state: State, operation: str, sub: str, *, own: bool, restoring: bool, uuid: str, image: object
) -> tuple[HookAction, str]:
    """
    What to do at a step of a domain, and why it is refused if it is.

    :param own: whether it is the domain whose guest is in the transit; ``uuid`` is that one's.
    :param restoring: a restore of it is in progress.
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
    if step in _COLD_STARTS or (step == ("prepare", "begin") and state is not State.RESTORING):
        return HookAction.REFUSE, f"cannot start the domain: its guest runs in the transit; run: virsh restore {image}"
    if step == ("started", "begin") and state is not State.RESTORING:
        return HookAction.REFUSE, f"cannot restore the guest: it is {state.value}; restore the domain again"
    return HookAction.ALLOW, ""
