"""
How far the guest of a keeper has come, and what may be done in each state.

Decisions only, without sockets and processes (those are in :mod:`sevhop.keeper.server`). :class:`Facts` decide, above
all the state, and whether the guest has run in a destination (:mod:`sevhop_qmp.run_mark`). Each ``reason_against_*``
returns why a request is refused, empty when it is not. ::

    held ──> retiring ──> waiting ──restore begin──> restoring ──started begin──> committed ──the guest runs──> over
                             ^                          │                            │
                             └──────────────────────────┴── the destination exited ──┴── it had run there ──> lost
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class State(enum.Enum):
    """
    How far the guest has come.

    ``HELD``
        the source has the guest; the keeper has duplicates of its memory and VM
    ``RETIRING``
        the device state is saved, and the source is being terminated
    ``WAITING``
        the source is gone: the guest is suspended in the keeper
    ``RESTORING``
        libvirt starts a destination from the save image
    ``COMMITTED``
        the destination has the guest, and may run it
    ``OVER``
        the guest runs in the destination, or has
    ``LOST``
        it has run there, and the destination exited before anybody was notified; what the keeper has is outdated
    """

    HELD = "held"
    RETIRING = "retiring"
    WAITING = "waiting"
    RESTORING = "restoring"
    COMMITTED = "committed"
    OVER = "over"
    LOST = "lost"


class Attempt(enum.Enum):
    """
    What has become of the last restore.

    ``NONE``
        it has no destination that lives
    ``IN_PROGRESS``
        it has one, which may run the guest yet
    ``ORPHANED``
        it has one that can never run, since the daemon that was restoring it has died
    """

    NONE = enum.auto()
    IN_PROGRESS = enum.auto()
    ORPHANED = enum.auto()


class HookAction(enum.Enum):
    """What the keeper does at a step of the hook: refuse it, allow it, or do something first."""

    REFUSE = enum.auto()
    IGNORE = enum.auto()
    ALLOW = enum.auto()
    BEGIN_RESTORE = enum.auto()
    COMMIT = enum.auto()


@dataclass(frozen=True)
class Facts:
    """
    What decides.

    :ivar has_run: the guest has run in a destination, or may have.
    :ivar committing: a commit is in progress.
    """

    state: State
    has_run: bool = False
    committing: bool = False
    attempt: Attempt = Attempt.NONE


#: The guest may exist nowhere but in the keeper.
KEEPER_NEEDED = frozenset({State.RETIRING, State.WAITING, State.RESTORING, State.COMMITTED})
#: The source has been terminated.
SOURCE_GONE = frozenset({State.WAITING, State.RESTORING, State.COMMITTED, State.OVER, State.LOST})
#: The domain is libvirt's again; nothing is kept for it any more.
FINISHED = frozenset({State.OVER, State.LOST})
#: No restore has begun.
_NO_DESTINATION = frozenset({State.HELD, State.RETIRING, State.WAITING})

#: Why a guest is not restored again.
RAN = "the guest has run in a new QEMU already"
_RECOVER = "run: sevhop recover"

#: Steps at which a domain is started that is not being restored.
_COLD_STARTS = frozenset({("prepare", "begin"), ("prepare", "cold-start"), ("migrate", "begin")})


def reason_against_request(state: State, request: str) -> str:
    """Against a request of the command that is known, but impossible now."""
    return f'cannot {request}: the keeper is in state "{state.value}"; see: sevhop status'


def reason_against_restore(state: State, *, has_run: bool) -> str:
    """Against ``restore begin``."""
    if state in (State.HELD, State.RETIRING):
        return "cannot restore the guest: it has not been saved yet; wait for its hop"
    if state is State.OVER:
        return "cannot restore the guest: it runs; see: sevhop status"
    return f"cannot restore the guest: {RAN}; {_RECOVER}" if state is State.LOST or has_run else ""


def reason_against_another_image(state: State, image: object) -> str:
    """Against a restore of the domain from an image that the guest is not in."""
    if state in _NO_DESTINATION - SOURCE_GONE or state in FINISHED:
        return reason_against_restore(state, has_run=False)
    return (
        f"cannot restore the domain from this image: its guest is suspended in the keeper; run: virsh restore {image}"
    )


def reason_against_start(state: State, operation: str, sub: str, image: object) -> str:
    """Against a cold start of the domain, or its migration to here. A restore has its ``prepare begin``, too."""
    restoring = (operation, sub) == ("prepare", "begin") and state not in _NO_DESTINATION
    if restoring or state in FINISHED or (operation, sub) not in _COLD_STARTS:
        return ""
    return f"cannot start the domain: the guest is suspended in the keeper; run: virsh restore {image}"


def reason_against_commit(state: State, *, has_run: bool, committing: bool) -> str:
    """Against ``started begin`` of a domain whose guest the keeper has."""
    if has_run:
        return f"cannot start the guest: {RAN}; {_RECOVER}"
    possible = state is State.RESTORING and not committing
    return "" if possible else reason_against_request(state, "start the guest")


def reason_against_namesake(state: State, operation: str, sub: str, uuid: str, image: object) -> str:
    """
    Against another domain of the same name: one that was defined or created again without a UUID gets another one. Both
    would have the same files, and libvirt could not restore the suspended one.

    :param uuid: of the domain whose guest the keeper has.
    """
    starts = operation in ("prepare", "restore", "migrate") and sub in ("begin", "cold-start", "another")
    if not starts or state is State.OVER:
        return ""
    hint = f"run: virsh restore {image}" if state in SOURCE_GONE else "wait for it, or run: sevhop recover"
    return f"cannot start the domain: a hop has reserved its name for the domain with UUID {uuid}; {hint}"


def at_hook(facts: Facts, operation: str, sub: str, *, own: bool, uuid: str, image: object) -> tuple[HookAction, str]:
    """
    What to do at a step of a domain, and why it is refused if it is.

    :param own: whether it is the domain whose guest the keeper has; ``uuid`` is that one's.
    """
    action, reason = HookAction.ALLOW, ""
    if not own:
        action, reason = HookAction.IGNORE, reason_against_namesake(facts.state, operation, sub, uuid, image)
    elif reason := reason_against_start(facts.state, operation, sub, image):
        pass
    elif (operation, sub) == ("restore", "another"):
        reason = reason_against_another_image(facts.state, image)
    elif (operation, sub) == ("restore", "begin"):
        action = HookAction.BEGIN_RESTORE
        if facts.committing or (not facts.has_run and facts.attempt is Attempt.IN_PROGRESS):
            reason = f"cannot restore the guest: it is being restored already; wait, or {_RECOVER}"
        else:
            reason = reason_against_restore(facts.state, has_run=facts.has_run)
    elif (operation, sub) == ("started", "begin") and facts.state not in FINISHED:
        action = HookAction.COMMIT
        reason = reason_against_commit(facts.state, has_run=facts.has_run, committing=facts.committing)
    return (HookAction.REFUSE, reason) if reason else (action, "")


def after_destination_exit(*, has_run: bool) -> tuple[State, str]:
    """The state after a destination has exited that was committed to and not seen to run the guest, and why."""
    return (State.LOST, RAN) if has_run else (State.WAITING, "the new QEMU exited before the guest ran")


def exits_with_command(state: State) -> bool:
    """Whether nobody needs the keeper once the command is gone: the source still has everything, or libvirt has."""
    return state is State.HELD or state in FINISHED
