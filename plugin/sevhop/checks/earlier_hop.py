"""An earlier hop of a guest: as long as it is not finished another one is refused."""

from __future__ import annotations

from ..records import journal
from ..records.hop_record import Process
from ..records.journal import HopInterrupted, JournalError
from ..records.run_directory import HopInProgress
from .result import CheckResult, failed


def add(tree: CheckResult, *known_as: Process | str) -> CheckResult:
    """
    A check that fails if such a hop is in progress or was interrupted.

    :param tree: the check of a guest that could hop otherwise, or could not.
    :param known_as: see :func:`.journal.expect_none`.
    """
    try:
        for guest in known_as:
            journal.expect_none(guest)
    except (HopInterrupted, HopInProgress) as err:
        tree.children.insert(0, failed("earlier hop", err.message, err.hint))
    except JournalError:
        pass  # only root can know
    return tree
