"""
sevhop from Python: what the command line does, and nothing else. ::

    import asyncio
    from sevhop import api

    report = asyncio.run(api.upgrade("web1", emulator="/usr/bin/qemu-system-x86_64"))
    print(report, report.blackout_ms)

=====================  ===========================================================================
:func:`hop`            replace the QEMU under a guest that runs outside libvirt
:func:`upgrade`        the same for a domain of libvirt
:func:`upgrade_fleet`  the same for several, a few at a time
:func:`check`          whether a guest can hop, as a tree of tests
:func:`status`         which QEMU runs each domain, and whether a newer one is installed
:func:`recover`        finish or undo hops that were broken off
=====================  ===========================================================================

All are coroutines. Errors are :exc:`SevhopError` and those below it (:mod:`sevhop.errors`); what a hop came to is in
its :class:`Report`.

**To undo**, cancel the task. A hop that can still be undone is undone, in full, and then :exc:`asyncio.CancelledError`
is raised. One that has come too far goes on to its end, and the call returns as if nothing had happened. A program that
is killed leaves the rest to :func:`recover`.

**Progress** is told to a listener: a function that is called with an :class:`Event`. It is called in the event loop, in
order, and never while a guest is stopped, unless that takes longer than a second: so whatever it does, no pause becomes
longer by it. What it raises is logged and ends no hop. Who hops several guests at a time should leave that to one
:func:`upgrade_fleet`, which keeps this promise for all of them together.

**Stability.** Public are the names in ``__all__`` here, their parameters and public attributes, the classes in
:mod:`sevhop.errors`, and of the command line its arguments, exit codes and ``--json`` objects. They follow semantic
versioning: within a major version nothing of them goes away or changes its meaning; parameters, attributes, keys,
events, and outcomes may be added, so ignore what you do not know. Before 1.0 a minor version may break this, and
CHANGELOG.md says so. Texts for people (reasons, notes, remedies) may change at any time, and everything else in these
packages is private.
"""

from __future__ import annotations

import asyncio
import enum
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypedDict, Unpack

from sevhop_qmp.errors import SevhopError
from sevhop_qmp.monitor import COMMAND_TIMEOUT, Monitor
from sevhop_qmp.process import QemuProcess

from .checks import guest as checks
from .checks.domain_status import Standing
from .checks.result import Finding, Status
from .engine import hop as bare
from .engine import recovery
from .engine.recovery_result import End, Recovered
from .errors import Interrupted, Lost, NeedsRecover, Refused, Undone
from .events import (
    Chosen,
    Ended,
    Event,
    GuestEvent,
    GuestRuns,
    GuestStopped,
    Listener,
    MoveTried,
    PhaseBegan,
    PhaseEnded,
    Unhurried,
    ignore,
)
from .report import Phase, Report

__all__ = [
    "Choice",
    "Chosen",
    "End",
    "Ended",
    "Event",
    "Finding",
    "GuestEvent",
    "GuestRuns",
    "GuestStopped",
    "HopOptions",
    "Interrupted",
    "Listener",
    "Lost",
    "MoveTried",
    "NeedsRecover",
    "Phase",
    "PhaseBegan",
    "PhaseEnded",
    "Recovered",
    "Refused",
    "Report",
    "SevhopError",
    "Standing",
    "Status",
    "Undone",
    "UpgradeOptions",
    "check",
    "hop",
    "recover",
    "status",
    "upgrade",
    "upgrade_fleet",
]


class HopOptions(TypedDict, total=False):
    """
    What may be said of a hop.

    ``emulator``
        the QEMU to hop to; by default the file from which the source was started, as it is now
    ``command``
        the destination's whole command line; by default the source's own
    ``step_timeout``
        seconds that each step in the blackout may take
    ``start_timeout``
        seconds in which the new QEMU must come up
    ``move_deadline``
        seconds for which a busy migration of the SEV context is tried again
    """

    emulator: str | None
    command: Sequence[str] | None
    step_timeout: float
    start_timeout: float
    move_deadline: float


class UpgradeOptions(TypedDict, total=False):
    """
    What may be said of an upgrade.

    ``emulator``
        the QEMU to go to; by default the one that the domain was started from, as it is on disk now
    ``dry_run``
        check only; the outcome is ``checked``
    ``rehearse``
        have the new QEMU load a trial copy of the device state first (the default)
    ``prepare_only``
        stop when the guest is held; the outcome is ``prepared``, and ``virsh restore`` goes on with the report's image
    ``step_timeout``, ``move_deadline``
        as in :class:`HopOptions`
    """

    emulator: str | None
    dry_run: bool
    rehearse: bool
    prepare_only: bool
    step_timeout: float
    move_deadline: float


class Choice(enum.Enum):
    """Domains that are chosen by a rule. One of them that cannot hop is left out, and ends nothing."""

    ALL = "all active domains"
    OUTDATED = "all active domains whose QEMU is another version than is installed, or was replaced on disk"


async def hop(
    source: str | os.PathLike[str], *, listener: Listener = ignore, **options: Unpack[HopOptions]
) -> Report:
    """
    Replace the QEMU under a running guest.

    :param source: its QMP socket.
    :param options: see :class:`HopOptions`.
    :raises Refused: the guest cannot hop; nothing was touched.
    :raises Undone: something failed and the guest runs where it ran.
    :raises NeedsRecover: something failed, the guest does not run, but nothing of it is lost.
    :raises Lost: its QEMU ended by itself before its state was saved.
    """
    unhurried = Unhurried(listener)
    one = bare.Hop(bare.Options(Path(source), **options), unhurried)
    await _interruptible(one, unhurried)
    return one.report


async def upgrade(
    domain: str, *, connect: str | None = None, listener: Listener = ignore, **options: Unpack[UpgradeOptions]
) -> Report:
    """
    Replace the QEMU of a domain of libvirt.

    :param connect: URI of the libvirt that has it; by default that of the system.
    :param options: see :class:`UpgradeOptions`.
    :raises SevhopError: as :func:`hop`.
    """
    expect_libvirt()
    from .engine import upgrade as engine
    from .libvirt.connection import DEFAULT_URI

    unhurried = Unhurried(listener)
    one = engine.Upgrade(connect or DEFAULT_URI, domain, engine.Options(**options), unhurried)
    await _interruptible(one, unhurried)
    return one.report


async def upgrade_fleet(
    domains: Sequence[str] | Choice,
    *,
    jobs: int = 1,
    keep_going: bool = False,
    connect: str | None = None,
    listener: Listener = ignore,
    **options: Unpack[UpgradeOptions],
) -> list[Report]:
    """
    Replace the QEMU of several domains of libvirt. What becomes of each is in its report, and not raised.

    :param domains: their names, or a rule that chooses them.
    :param jobs: how many may be upgraded, and so stopped, at a time.
    :param keep_going: begin further ones when one fails or is refused.
    :param options: see :class:`UpgradeOptions`.
    :return: the reports of those that were begun, in this order.
    :raises SevhopError: libvirt does not tell which domains there are; nothing was touched.
    """
    if jobs < 1:
        raise ValueError(f"{jobs} jobs")
    expect_libvirt()
    from .engine import fleet
    from .engine import upgrade as engine
    from .libvirt.connection import DEFAULT_URI

    uri = connect or DEFAULT_URI
    chosen = isinstance(domains, Choice)
    if domains is Choice.ALL:
        names = await fleet.all_active(uri)
    elif domains is Choice.OUTDATED:
        names = await fleet.all_outdated(uri, options.get("emulator"))
    else:
        names = list(domains)
    unhurried = Unhurried(listener)
    all_of_them = fleet.Fleet(
        uri,
        names,
        engine.Options(**options),
        chosen=chosen,
        jobs=jobs,
        keep_going=keep_going,
        listener=unhurried,
    )
    await _interruptible(all_of_them, unhurried)
    return [one.report for one in all_of_them.upgrades]


async def check(
    domain: str | None = None,
    *,
    source: str | os.PathLike[str] | None = None,
    emulator: str | None = None,
    connect: str | None = None,
) -> Finding:
    """
    Whether a guest can hop. Nothing is touched.

    :param domain: of libvirt; or else
    :param source: the QMP socket of a QEMU outside libvirt.
    :param emulator: the QEMU to go to; by default its own, as it is on disk now.
    :raises SevhopError: it cannot be looked into at all.
    """
    if (domain is None) == (source is None):
        raise TypeError("either a domain or a source can be checked")
    if domain is not None:
        expect_libvirt()
        from .checks import domain as domain_checks
        from .libvirt.connection import DEFAULT_URI

        return await domain_checks.check_domain(connect or DEFAULT_URI, domain, emulator)
    assert source is not None
    async with await Monitor.connect(Path(source)) as monitor:
        process = QemuProcess.open(monitor.peer)
        try:
            return (await checks.bare(monitor, process, emulator)).tree
        finally:
            process.close()


async def status(domains: Sequence[str] = (), *, connect: str | None = None) -> list[Standing]:
    """
    Which QEMU runs each domain, which one is installed, whether it can hop, and whether a hop is under way.

    :param domains: their names; all that are active when there are none.
    :raises SevhopError: libvirt does not answer, or has no such domain.
    """
    expect_libvirt()
    from .checks import status as standings
    from .libvirt.connection import DEFAULT_URI

    return await standings.survey(connect or DEFAULT_URI, domains)


async def recover(guests: Sequence[str] = (), *, step_timeout: float = COMMAND_TIMEOUT) -> list[Recovered]:
    """
    Finish or undo hops that were broken off. Safe at any time, also when nothing is wrong.

    :param guests: their names; all when there are none.
    :return: what has become of each of them.
    """
    return await recovery.recover(guests, timeout=step_timeout)


def expect_libvirt() -> None:
    """
    libvirt's Python package is optional, since hops outside libvirt do without.

    :raises Refused: it is not there.
    """
    if importlib.util.find_spec("libvirt") is None:
        raise Refused("libvirt's Python package is missing", "pip install 'sevhop[libvirt]'")


class _Work(Protocol):
    async def run(self) -> Any:
        """To its end."""

    def interrupt(self) -> bool:
        """Undo it if possible."""


async def _interruptible(work: _Work, unhurried: Unhurried) -> None:
    """Do it. If we are cancelled it is undone first, or comes to its end."""
    task = asyncio.ensure_future(work.run())
    cancelled: asyncio.CancelledError | None = None
    try:
        while not task.done():
            try:
                await asyncio.wait({task})
            except asyncio.CancelledError as err:
                work.interrupt()
                cancelled = err
        task.result()
    except Interrupted as err:
        raise cancelled or err from err
    finally:
        unhurried.flush()
