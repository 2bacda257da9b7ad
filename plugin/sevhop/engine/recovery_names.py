"""What the names mean that a recovery is given: typing errors are found before anything is touched."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Sequence

from ..errors import Refused
from ..records import journal
from ..records.journal import JournalError
from . import damaged_hop


async def resolve(guests: Sequence[str], *, emulator: str | None = None) -> list[str]:
    """
    Names for :func:`sevhop.engine.recovery.recover`; a guest whose journal is damaged is called like that.

    :param emulator: the QEMU to restore the guest in, if that was chosen.
    :raises Refused: there is no such guest, or none that could be restored in the emulator.
    :raises JournalError: it is unknown which journals there are, or one that is to be restored from is damaged.
    """
    names = list(guests)
    for name in _without_hop(guests):
        if (damaged := await damaged_hop.find(name)) is not None:
            if emulator is not None:
                journal.read(damaged)
            names.append(damaged.name)
            continue
        await _verify_exists(name)
        if emulator is not None:
            raise Refused(f"no hop of {name} was interrupted", f"to upgrade it: sevhop upgrade {shlex.quote(name)}")
    return names


def _without_hop(names: Sequence[str]) -> list[str]:
    """Those of some guests that have no interrupted hop, as far as the journal can be read."""
    known: set[str] = set()
    for path in journal.journals():
        try:
            record = journal.read(path)
        except JournalError:
            continue
        known |= {record.guest, record.uuid}
    return [name for name in names if name not in known]


async def _verify_exists(guest: str) -> None:
    """:raises Refused: it is neither a domain, as far as libvirt answers, nor a QMP socket."""
    if "/" in guest or importlib.util.find_spec("libvirt") is None:
        return
    from ..libvirt.connection import Connection
    from ..libvirt.daemon import NO_DOMAIN, DomainError

    try:
        connection = await Connection.open()
        try:
            await connection.look_up(guest)
        finally:
            connection.close()
    except DomainError as err:
        if err.code == NO_DOMAIN:
            raise Refused(f"neither a domain nor an interrupted hop is named {guest}", "see: sevhop status") from err
