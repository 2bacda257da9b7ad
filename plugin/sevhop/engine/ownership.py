"""
Who may run the guest: what is known of an interrupted hop, and what may be done with its two QEMUs.

Pure: :func:`decide` takes :class:`Facts` and touches nothing. The rules are few.

- The guest's memory exists once. When the guest has run in the destination, the state in the source is outdated, and
  the source never runs again.
- Before that the source has all of it, and the destination may be terminated. That it has not run there must be
  *proven*: by the run mark (:mod:`sevhop_qmp.run_mark`), by the destination itself, or because the hop had not come so
  far that it could.
- What is unknown is left as it is, for manual action: neither QEMU is resumed, and neither is terminated.
- A guest whose SEV context was moved is in the destination, whether it has run there or not.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from sevhop_qmp.run_mark import RunState

#: Phases in which the destination may have all of the guest. Before them it has not been given its state.
_STATE_GIVEN = ("save", "load", "commit", "resume", "finish")
#: Phases in which it may have been started: its stream has ended, or is about to.
_MAY_RUN = ("load", "commit", "resume", "finish")
#: Phases in which an SEV context may have been moved.
_MAY_MOVE = ("commit", "resume", "finish")


class Source(enum.Enum):
    """What the source was probed to do."""

    ENDED = "has exited"
    HALTED = "executes nothing"
    STOPPED = "answers, and does not run the guest"
    RUNS = "runs the guest"
    SILENT = "does not answer"


class Destination(enum.Enum):
    """What the destination was probed to do; ``ENDED`` also if none was started."""

    ENDED = "has exited"
    LOADING = "waits for the guest's state"
    LOADED = "has all of the guest, and does not run it"
    RUNS = "runs the guest"
    SILENT = "does not answer"


class Course(enum.Enum):
    """What is to be done."""

    COMPLETE = "the guest is the destination's: terminate the source"
    ROLL_BACK = "the guest is the source's: terminate the destination"
    MANUAL = "it is unknown who has the guest, or it cannot run"
    GONE = "no process has the guest any more"


@dataclass(frozen=True)
class Facts:
    """
    What is known when the command of the hop has exited.

    :ivar phase, committed, loaded, broken: as the journal has them.
    :ivar sev: whether the guest has an SEV context.
    :ivar running: whether the guest ran when the hop began.
    :ivar mark: None if none was found.
    :ivar ran: whether the destination reports that the guest has run there; None if it does not answer.
    :ivar moved: whether it reports that it has the SEV context.
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
        """Whether the guest has run in the destination; None if that is unknown."""
        if self.mark is RunState.RAN or self.ran or self.destination is Destination.RUNS:
            return True
        # It answers only between two steps of its own, and the keeper that would have to accept a start is gone.
        if self.mark is RunState.NOT or self.ran is False or self.phase not in _MAY_RUN:
            return False
        if self.mark is None and self.committed and self.running and not self.sev:
            return True  # it had reported that to the command
        return None

    @property
    def _context_is_there(self) -> bool | None:
        """Whether the SEV context is the destination's; None if that is unknown."""
        if not self.sev or self.phase not in _MAY_MOVE:
            return False
        if self.moved or self.committed:
            return True
        return None if self.destination is Destination.SILENT else False


@dataclass(frozen=True)
class Decision:
    """
    What is to be done, and why.

    :ivar resume: the guest has not run in the destination yet, and must be resumed there.
    :ivar reason: for the administrator, if it is MANUAL or GONE.
    """

    course: Course
    reason: str = ""
    resume: bool = False


def decide(facts: Facts) -> Decision:
    """What may be done. Call it again whenever something has changed: a process may exit at any time."""
    if facts.destination is Destination.ENDED:
        return _without_destination(facts)
    if facts.source is Source.ENDED:
        return _without_source(facts)
    return _with_both(facts)


def _without_destination(facts: Facts) -> Decision:
    if facts.source is Source.ENDED:
        return Decision(Course.GONE, "its QEMU has exited" + (", and the new one" if facts.phase in _MAY_RUN else ""))
    match facts.has_run:
        case True if facts.source is Source.RUNS:
            return _manual("it ran in the new QEMU, which has exited, and another client has resumed the old one since")
        case True:
            return Decision(Course.GONE, "it ran in the new QEMU, which has exited")
        case None:
            return _manual("the new QEMU has exited, and it is unknown whether the guest has run there")
    if facts.sev and facts.committed:
        return Decision(Course.GONE, "its SEV context had been moved to the new QEMU, which has exited")
    return Decision(Course.ROLL_BACK)


def _without_source(facts: Facts) -> Decision:
    match facts.destination:
        case Destination.RUNS | Destination.LOADED:
            return _complete(facts)
        case _ if facts.phase not in _STATE_GIVEN:
            return Decision(Course.GONE, "its QEMU has exited")
        case Destination.LOADING:
            return _manual("the old QEMU has exited, and the new one has not loaded the guest's state")
    return _manual("the old QEMU has exited, and the new one, which may have the guest, does not answer")


def _with_both(facts: Facts) -> Decision:
    silent = facts.destination is Destination.SILENT
    has_run, context = facts.has_run, facts._context_is_there
    if facts.source is Source.RUNS:
        if has_run is False:
            return Decision(Course.ROLL_BACK)
        return _manual(
            "another client has resumed the old QEMU, and the guest may run in BOTH: terminate one now, its disks "
            "are at risk"
        )
    if has_run is None or (has_run and silent):
        return _manual("the new QEMU may have the guest, and does not answer")
    if has_run:
        return _complete(facts)
    if context or (facts.committed and not facts.sev):
        return _manual("the new QEMU has the guest, and does not answer") if silent else _complete(facts)
    if context is None:
        return _manual("the new QEMU may have the guest's SEV context, and does not answer")
    return Decision(Course.ROLL_BACK)


def _complete(facts: Facts) -> Decision:
    if facts.sev and not facts.moved:
        return _manual("the new QEMU has the guest without its SEV context, which was lost with the old QEMU")
    if facts.broken:
        return _manual(f"the guest is in the new QEMU, and cannot run: {facts.broken}")
    return Decision(Course.COMPLETE, resume=facts.running and not facts.has_run)


def _manual(reason: str) -> Decision:
    return Decision(Course.MANUAL, reason)


def destination_ended(facts: Facts) -> Facts:
    """The facts when the destination has exited; what it was about to do does not happen any more."""
    return replace(facts, destination=Destination.ENDED, ran=None, moved=False)
