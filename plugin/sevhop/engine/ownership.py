"""
Who may run the guest: what is known of a hop that was interrupted, and what may be done with its two QEMUs.

Pure: :func:`decide` looks at :class:`Facts` and touches nothing. The rules are few.

- The guest's memory is one. Once the guest has run in the destination, what the source has is of the past, and the
  source never runs again.
- Before that the source has all of it, and the destination may be terminated. That it has not run there must be
  *proven*: by the run mark (:mod:`sevhop_qmp.run_mark`), by the destination itself, or because the hop had not come so
  far that it could.
- What cannot be told is left as it is, for a person to decide: neither QEMU is continued, and neither is terminated.
- A guest whose SEV context was moved is in the destination, whether it has run there or not.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from sevhop_qmp.run_mark import RunState

#: Phases in which the destination may have all of the guest. Before them it has not been given its state.
_STATE_GIVEN = ("save", "load", "commit", "resume", "retire")
#: Phases in which it may have been let run: its stream has been ended, or is about to be.
_MAY_RUN = ("load", "commit", "resume", "retire")
#: Phases in which an SEV context may have been moved.
_MAY_MOVE = ("commit", "resume", "retire")


class Source(enum.Enum):
    """What is seen of the source."""

    ENDED = "has ended"
    HALTED = "executes nothing"
    STOPPED = "answers, and does not run the guest"
    RUNS = "runs the guest"
    SILENT = "does not answer"


class Destination(enum.Enum):
    """What is seen of the destination; a hop that had started none has one that has ended."""

    ENDED = "has ended"
    LOADING = "waits for the guest's state"
    LOADED = "has all of the guest, and does not run it"
    RUNS = "runs the guest"
    SILENT = "does not answer"


class Course(enum.Enum):
    """What is to be done."""

    FORWARD = "the guest is the destination's: terminate the source"
    BACK = "the guest is the source's: terminate the destination"
    MANUAL = "it cannot be told, or not be done"
    GONE = "no process has it any more"


@dataclass(frozen=True)
class Facts:
    """
    What is known when nobody is hopping the guest any more.

    :ivar phase, committed, loaded, broken: as the journal has them.
    :ivar sev: whether the guest has an SEV context.
    :ivar running: whether the guest ran when the hop began.
    :ivar mark: None when there is none to be found.
    :ivar ran: what the destination itself tells of that; None if it does not answer.
    :ivar moved: whether it tells that it has the SEV context.
    """

    source: Source
    destination: Destination
    mark: RunState | None = None
    ran: bool | None = None
    moved: bool = False
    phase: str = ""
    committed: bool = False
    loaded: bool = False
    broken: str = ""
    sev: bool = False
    running: bool = True

    @property
    def has_run(self) -> bool | None:
        """Whether the guest has run in the destination; None when that cannot be told."""
        if self.mark is RunState.RAN or self.ran or self.destination is Destination.RUNS:
            return True
        # It answers only between two steps of its own, and whom it would have to tell first is not there any more.
        if self.mark is RunState.NOT or self.ran is False or self.phase not in _MAY_RUN:
            return False
        if self.mark is None and self.committed and self.running and not self.sev:
            return True  # it had told the command, or the command had seen it
        return None

    @property
    def _context_is_there(self) -> bool | None:
        """Whether the SEV context is the destination's; None when that cannot be told."""
        if not self.sev or self.phase not in _MAY_MOVE:
            return False
        if self.moved or self.committed:
            return True
        return None if self.destination is Destination.SILENT else False


@dataclass(frozen=True)
class Decision:
    """
    What is to be done, and why.

    :ivar resume: the guest has not run in the destination yet, and is to.
    :ivar reason: for people, if it is MANUAL or GONE.
    """

    course: Course
    reason: str = ""
    resume: bool = False


def decide(facts: Facts) -> Decision:
    """What may be done. To be asked again whenever something has changed: a process may end at any time."""
    if facts.destination is Destination.ENDED:
        return _without_destination(facts)
    if facts.source is Source.ENDED:
        return _without_source(facts)
    return _with_both(facts)


def _without_destination(facts: Facts) -> Decision:
    if facts.source is Source.ENDED:
        return Decision(Course.GONE, "its QEMU has ended" + (", and the new one" if facts.phase in _MAY_RUN else ""))
    match facts.has_run:
        case True if facts.source is Source.RUNS:
            return _manual("it ran in the new QEMU, which has ended, and somebody has continued the old one since")
        case True:
            return Decision(Course.GONE, "it ran in the new QEMU, which has ended")
        case None:
            return _manual("the new QEMU has ended, and whether the guest has run there cannot be told")
    if facts.sev and facts.committed:
        return Decision(Course.GONE, "its SEV context had been moved to the new QEMU, which has ended")
    return Decision(Course.BACK)


def _without_source(facts: Facts) -> Decision:
    match facts.destination:
        case Destination.RUNS | Destination.LOADED:
            return _forward(facts)
        case _ if facts.phase not in _STATE_GIVEN:
            return Decision(Course.GONE, "its QEMU has ended")
        case Destination.LOADING:
            return _manual("the old QEMU has ended, and the new one has not loaded the guest's state")
    return _manual("the old QEMU has ended, and the new one, which may have the guest, does not answer")


def _with_both(facts: Facts) -> Decision:
    silent = facts.destination is Destination.SILENT
    has_run, context = facts.has_run, facts._context_is_there
    if facts.source is Source.RUNS:
        if has_run is False:
            return Decision(Course.BACK)
        return _manual("its old QEMU was continued by somebody else, and has it as well")
    if has_run is None or (has_run and silent):
        return _manual("the new QEMU may have the guest, and does not answer")
    if has_run:
        return _forward(facts)
    if context or (facts.committed and not facts.sev):
        return _manual("the new QEMU has the guest, and does not answer") if silent else _forward(facts)
    if context is None:
        return _manual("the new QEMU may have the guest's SEV context, and does not answer")
    return Decision(Course.BACK)


def _forward(facts: Facts) -> Decision:
    if facts.sev and not facts.moved:
        return _manual("all of it is in the new QEMU but the SEV context, which ended with its old QEMU")
    if facts.broken:
        return _manual(f"it is in the new QEMU, and cannot run: {facts.broken}")
    return Decision(Course.FORWARD, resume=facts.running and not facts.has_run)


def _manual(reason: str) -> Decision:
    return Decision(Course.MANUAL, reason)


def destination_ended(facts: Facts) -> Facts:
    """The facts when the destination has been seen to have ended; what it was about to do does not happen any more."""
    return replace(facts, destination=Destination.ENDED, ran=None, moved=False)
