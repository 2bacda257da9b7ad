"""
Recover interrupted hops: finish them, or roll them back. The guest then runs in its new QEMU, or in the old one.

The :mod:`sevhop.records.journal` has what was in progress; what has become of it is probed. Each kind of hop has a
module with ``settle``, which probes and decides, ``finish`` and ``rollback``: :mod:`sevhop.engine.hop_recovery`, and
:mod:`sevhop.engine.domain_recovery`. Nothing is done to a hop whose command is still alive, and nothing is done twice:
a recovery may be interrupted and repeated. One that nobody has asked for waits longer after each failure
(:mod:`sevhop.records.back_off`).
"""

from __future__ import annotations

import contextlib
import logging
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sevhop_qmp.errors import SevhopError

from ..errors import LOST_HINT, GuestState, HopError, Refused
from ..options import RecoverOptions
from ..records import back_off, journal, run_directory
from ..records.journal import Journal, JournalError
from ..records.run_directory import HopInProgress
from . import hop_recovery
from .recovery_result import RecoveredGuest, RecoveryOutcome

log = logging.getLogger(__name__)

_PAUSED = "it was paused when its hop began"


async def recover(names: Sequence[str] = (), options: RecoverOptions = RecoverOptions()) -> list[RecoveredGuest]:
    """
    Complete interrupted hops, or roll them back.

    :param names: of guests, and of damaged journals; all when there are none. An upgrade that was prepared on purpose
        is skipped then.
    :raises Refused: the emulator in the options cannot have the guest; nothing was touched.
    """
    journal.remove_unfinished()
    found = [one for path in journal.journals() if (one := await _recover(path, names, options)) is not None]
    sweep()
    return found


def sweep() -> None:
    """Remove what killed hops have left in ``/run/sevhop``, as far as no journal that can be read mentions it."""
    run_directory.sweep({directory for path in journal.journals() for directory in directories_of(path)})


def directories_of(path: Path) -> set[str]:
    """The run directories of a hop, also that of a keeper which the journal does not have yet."""
    try:
        record = journal.read(path)
    except JournalError:
        return set()
    of_keeper = str(run_directory.hop_with(record.uuid)) if record.uuid else ""
    return {record.directory, record.transit_directory, of_keeper} - {""}


async def _recover(path: Path, names: Sequence[str], options: RecoverOptions) -> RecoveredGuest | None:
    try:
        record = journal.read(path)
    except JournalError as err:
        if (names and path.name not in names) or not path.exists():
            return None
        return RecoveredGuest(path.name, RecoveryOutcome.MANUAL, str(err))
    if names and record.guest not in names and record.uuid not in names:
        return None
    try:
        mine = Journal.take_over(path)
    except HopInProgress as err:
        return RecoveredGuest(record.guest, RecoveryOutcome.IN_PROGRESS, err.message)
    except JournalError as err:
        return None if not path.exists() else RecoveredGuest(record.guest, RecoveryOutcome.MANUAL, str(err))
    record = mine.record
    if options.unattended and back_off.remaining(record):
        mine.leave()
        when = f"{back_off.next_attempt(record)}, or by: sevhop recover {shlex.quote(record.guest)}"
        return RecoveredGuest(record.guest, RecoveryOutcome.POSTPONED, f"{record.failure}; {when}")
    log.info("%s: interrupted in phase %s", record.guest, record.phase)
    try:
        recovered = await _settle(mine, bool(names), options)
    except Refused:  # what the caller has asked for
        mine.leave()
        raise
    except SevhopError as err:
        with contextlib.suppress(JournalError):
            mine.write(back_off.after_failure(record, str(err), unattended=options.unattended))
        mine.leave()
        return RecoveredGuest(record.guest, RecoveryOutcome.MANUAL, _with_state(err))
    except BaseException:
        mine.leave()
        raise
    runs = recovered.result in (RecoveryOutcome.SOURCE, RecoveryOutcome.DESTINATION)
    if runs and not record.running:
        recovered = replace(recovered, detail="; ".join(filter(None, [recovered.detail, _PAUSED])))
    if recovered.result is RecoveryOutcome.IN_PROGRESS:
        mine.leave()
    else:
        mine.end()
    return recovered


def _with_state(error: SevhopError) -> str:
    """An error, and where the guest is, if that is known."""
    if isinstance(error, HopError) and error.guest_state is not GuestState.UNKNOWN:
        return f"{error}; the guest is {error.guest_state.value}"
    return str(error)


async def _settle(mine: Journal, named: bool, options: RecoverOptions) -> RecoveredGuest:
    record = mine.record
    if not record.this_boot:
        return RecoveredGuest(
            record.guest,
            RecoveryOutcome.GONE,
            f"the host was rebooted during the hop, and its memory is lost; {LOST_HINT}",
        )
    if record.kind == "domain":
        # libvirt is only needed here, and is optional.
        from . import domain_recovery

        return await domain_recovery.settle(mine, named=named, options=options)
    if options.emulator is not None:
        raise Refused("--emulator is for domains", "without it this guest is recovered in one of its two QEMUs")
    return await hop_recovery.settle(record, options.step_timeout)
