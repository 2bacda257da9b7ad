"""
sevhop from Python: what the command line does, and nothing else. ::

    import asyncio
    from sevhop import api

    report = asyncio.run(api.upgrade("web1", api.UpgradeOptions(emulator="/opt/qemu/bin/qemu-system-x86_64")))
    print(report, report.downtime_ms)

=====================  ===========================================================================
:func:`hop`            replace the QEMU under a guest that runs outside libvirt
:func:`upgrade`        the same for a domain of libvirt
:func:`upgrade_fleet`  the same for several, a few at a time
:func:`check`          whether a guest can hop, as a tree of tests
:func:`prepare`        change the definitions of domains so that their guests can hop when they were started again
:func:`status`         which QEMU runs each domain, and whether a newer one is installed
:func:`recover`        complete or roll back interrupted hops
:func:`discard`        give up a guest for which that is not possible, as :func:`assess_discard` says
=====================  ===========================================================================

All are coroutines. Errors are :exc:`SevhopError` and those below it (:mod:`sevhop.errors`); the outcome of a hop is in
its :class:`Report`.

**To roll back**, cancel the task. A hop before its commit is rolled back completely, and then
:exc:`asyncio.CancelledError` is raised. After the commit it is completed, and the call returns as usual. When the
program is killed, :func:`recover` does the rest.

**Progress** is reported to a listener: a function that is called with an :class:`Event`. It is called in the event
loop, in order, and not while a guest is stopped, unless that takes longer than a second: so no listener prolongs the
downtime. What it raises is logged and fails no hop. To hop several guests at a time use one :func:`upgrade_fleet`,
which guarantees this for all of them together.

**Stability.** Public are the names in ``__all__`` here, their parameters and public attributes, the classes in
:mod:`sevhop.errors`, and of the command line its arguments, exit codes and ``--json`` objects. They follow semantic
versioning: within a major version nothing of them is removed or changes its meaning; parameters, attributes, keys,
events, and outcomes may be added, so ignore what you do not know. Before 1.0 a minor version may break this, and
CHANGELOG.md says so. Texts for people (reasons, notes, hints) may change at any time, and everything else in these
packages is private.
"""

from __future__ import annotations

import asyncio
import enum
import importlib
import importlib.util
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from sevhop_qmp import peer
from sevhop_qmp.errors import SevhopError
from sevhop_qmp.monitor import COMMAND_TIMEOUT, Monitor
from sevhop_qmp.process import QemuProcess

from .checks import earlier_hop
from .checks import guest as guest_checks
from .checks.result import CheckResult, Status
from .engine import hop as standalone
from .errors import GuestLost, GuestState, HopError, Interrupted, RecoveryRequired, Refused, RolledBack
from .events import (
    DeferringListener,
    DomainsSelected,
    Event,
    GuestEvent,
    GuestResumed,
    GuestStopped,
    HopFinished,
    Listener,
    MoveAttempted,
    PhaseBegan,
    PhaseEnded,
    WindowClosed,
    ignore,
)
from .options import HopOptions, RecoverOptions, UpgradeOptions, Window
from .process import shutdown_inhibitor
from .records.hop_record import Process
from .report import Phase, Report

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .checks.domain_status import DomainStatus, Place
    from .engine.preparation_result import Preparations, PreparedDefinition
    from .engine.recovery_result import Loss, RecoveredGuest, RecoveryOutcome

__all__ = [
    "CheckResult",
    "Choice",
    "DomainStatus",
    "DomainsSelected",
    "Event",
    "GuestEvent",
    "GuestLost",
    "GuestResumed",
    "GuestState",
    "GuestStopped",
    "HopError",
    "HopFinished",
    "HopOptions",
    "Interrupted",
    "Listener",
    "Loss",
    "MoveAttempted",
    "Phase",
    "PhaseBegan",
    "PhaseEnded",
    "Place",
    "Preparations",
    "PreparedDefinition",
    "RecoveredGuest",
    "RecoveryOutcome",
    "RecoveryRequired",
    "Refused",
    "Report",
    "RolledBack",
    "SevhopError",
    "Status",
    "UpgradeOptions",
    "Window",
    "WindowClosed",
    "assess_discard",
    "check",
    "discard",
    "hop",
    "prepare",
    "recover",
    "status",
    "upgrade",
    "upgrade_fleet",
]


#: Results that a hop does not have: their modules are imported for who uses them.
_ELSEWHERE = {
    **dict.fromkeys(("DomainStatus", "Place"), "checks.domain_status"),
    **dict.fromkeys(("PreparedDefinition", "Preparations"), "engine.preparation_result"),
    **dict.fromkeys(("Loss", "RecoveredGuest", "RecoveryOutcome"), "engine.recovery_result"),
}


def __getattr__(name: str) -> Any:
    if name not in _ELSEWHERE:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(f".{_ELSEWHERE[name]}", __package__), name)


class Choice(enum.Enum):
    """Domains selected by a rule. One that cannot hop is skipped and reported."""

    ALL = "all active domains"
    OUTDATED = "all active domains whose QEMU is another version than is installed, or was replaced on disk"


async def hop(
    qmp: str | os.PathLike[str],
    options: HopOptions = HopOptions(),
    *,
    connection: socket.socket | None = None,
    listener: Listener = ignore,
) -> Report:
    """
    Replace the QEMU under a running guest.

    :param qmp: its QMP socket.
    :param connection: to that socket, if there is one already; the hop closes it.
    :raises Refused: the guest cannot hop; nothing was touched.
    :raises RolledBack: a phase failed, and the guest is in its old QEMU as before.
    :raises RecoveryRequired: a phase failed, and nothing of the guest is lost, but it must be recovered.
    :raises GuestLost: its QEMU exited before its state was saved.
    """
    deferring = DeferringListener(listener)
    one = standalone.Hop(Path(qmp), options, deferring, connection=connection)
    await _interruptible(one, deferring)
    return one.report


async def upgrade(
    domain: str,
    options: UpgradeOptions = UpgradeOptions(),
    *,
    connect: str | None = None,
    listener: Listener = ignore,
) -> Report:
    """
    Replace the QEMU of a domain of libvirt.

    :param connect: URI of the libvirt that has it; by default that of the system.
    :raises SevhopError: as :func:`hop`.
    """
    expect_libvirt()
    from .engine import upgrade as engine
    from .libvirt.daemon import DEFAULT_URI

    deferring = DeferringListener(listener)
    one = engine.Upgrade(connect or DEFAULT_URI, domain, options, deferring)
    await _interruptible(one, deferring)
    return one.report


async def upgrade_fleet(
    domains: Sequence[str] | Choice,
    options: UpgradeOptions = UpgradeOptions(),
    *,
    jobs: int = 1,
    keep_going: bool = False,
    max_failures: int = 1,
    exclude: Sequence[str] = (),
    window: Window | None = None,
    connect: str | None = None,
    listener: Listener = ignore,
) -> list[Report]:
    """
    Replace the QEMU of several domains of libvirt. The outcome of each is in its report, and not raised.

    :param domains: their names, UUIDs or ids, which are looked up before anything is done; or a rule that selects them.
    :param jobs: how many may be upgraded, and so stopped, at a time; fewer while the host has no memory for more.
    :param keep_going: begin further ones after one has failed or was refused.
    :param max_failures: how many guests may be lost or need a recovery until no further one begins all the same.
    :param exclude: patterns of the names of domains that a rule does not select, such as ``db-*``.
    :param window: when an upgrade may begin; always by default.
    :return: the reports of those that were begun, in this order.
    :raises SevhopError: there is no such domain, or libvirt does not list its domains; nothing was touched.
    """
    if jobs < 1 or max_failures < 1:
        raise ValueError(f"{jobs} jobs, {max_failures} failures")
    expect_libvirt()
    from .engine import fleet
    from .libvirt.daemon import DEFAULT_URI

    uri = connect or DEFAULT_URI
    if domains is Choice.ALL:
        selection = await fleet.all_active(uri, exclude)
    elif domains is Choice.OUTDATED:
        selection = await fleet.all_outdated(uri, options.emulator, exclude)
    else:
        assert not isinstance(domains, Choice)
        selection = await fleet.named(uri, domains)
    deferring = DeferringListener(listener)
    upgrades = fleet.Fleet(
        uri,
        selection,
        options,
        jobs=jobs,
        keep_going=keep_going,
        max_failures=max_failures,
        window=window,
        listener=deferring,
    )
    await _interruptible(upgrades, deferring)
    return [one.report for one in upgrades.upgrades]


async def check(
    domain: str | None = None,
    *,
    qmp: str | os.PathLike[str] | None = None,
    emulator: str | None = None,
    connect: str | None = None,
) -> CheckResult:
    """
    Whether a guest can hop. Nothing is touched.

    :param domain: of libvirt; or else
    :param qmp: the QMP socket of a QEMU outside libvirt.
    :param emulator: the QEMU to hop to; by default its own, as it is on disk now.
    :raises SevhopError: the guest cannot be inspected at all.
    """
    if (domain is None) == (qmp is None):
        raise TypeError("either a domain or a QMP socket can be checked")
    if domain is not None:
        expect_libvirt()
        from .checks import domain as domain_checks
        from .libvirt.daemon import DEFAULT_URI

        return await domain_checks.check_domain(connect or DEFAULT_URI, domain, emulator)
    assert qmp is not None
    async with await Monitor.connect(Path(qmp)) as monitor:
        process = QemuProcess.open(monitor.peer)
        try:
            tree = (await guest_checks.standalone(monitor, process, emulator)).tree
            return earlier_hop.add(tree, Process.of(process), peer.absolute(qmp))
        finally:
            process.close()


async def status(domains: Sequence[str] = (), *, connect: str | None = None) -> list[DomainStatus]:
    """
    Which QEMU runs each domain, which one is installed, whether it can hop, and whether a hop is in progress; and which
    guests outside libvirt have a hop that is.

    :param domains: names of both; when there are none, all domains that are active, and all that have a hop.
    :raises SevhopError: libvirt does not answer, or has no such domain.
    """
    expect_libvirt()
    from .checks import status as domain_status
    from .libvirt.daemon import DEFAULT_URI

    return await domain_status.survey(connect or DEFAULT_URI, domains)


async def prepare(
    domains: Sequence[str] | Choice,
    *,
    dry_run: bool = False,
    exclude: Sequence[str] = (),
    connect: str | None = None,
) -> Preparations:
    """
    Change the persistent definitions of domains so that their guests can hop when they were started again.

    :param domains: their names, UUIDs or ids; or :attr:`Choice.ALL` that are defined, active or not.
    :param dry_run: change nothing.
    :param exclude: patterns of the names of domains that are left out of all, such as ``db-*``.
    :raises SevhopError: there is no such domain, or libvirt does not answer; nothing was touched.
    """
    if domains is Choice.OUTDATED:
        raise ValueError(f"{domains} cannot be prepared")
    expect_libvirt()
    from .engine import preparation
    from .libvirt.daemon import DEFAULT_URI

    names = None if isinstance(domains, Choice) else domains
    return await preparation.prepare(connect or DEFAULT_URI, names, exclude=exclude, dry_run=dry_run)


async def recover(
    guests: Sequence[str] = (),
    *,
    unattended: bool = False,
    max_age: float | None = None,
    emulator: str | None = None,
    set_time: bool = True,
    step_timeout: float = COMMAND_TIMEOUT,
) -> list[RecoveredGuest]:
    """
    Complete or roll back interrupted hops. Safe at any time, also when there are none.

    :param guests: their names; all when there are none.
    :param unattended: nobody has asked for it: hops whose recovery has failed are tried less and less often.
    :param max_age: seconds after which a guest that is suspended in the keeper is not restored; None without a limit.
    :param emulator: the QEMU to restore one domain in, instead of those that its hop has recorded.
    :param set_time: have the guest agent set the clock of a guest that was stopped for more than a second.
    :return: the result for each of them that has an interrupted hop.
    :raises SevhopError: there is no such guest, or it cannot be restored in that emulator; nothing was touched.
    """
    if emulator is not None and len(guests) != 1:
        raise ValueError(f"an emulator for {len(guests)} guests")
    from .engine import recovery, recovery_names

    names = await recovery_names.resolve(guests, emulator=emulator)
    options = RecoverOptions(
        unattended=unattended, max_age=max_age, emulator=emulator, set_time=set_time, step_timeout=step_timeout
    )
    return await recovery.recover(names, options)


async def assess_discard(guest: str, *, step_timeout: float = COMMAND_TIMEOUT) -> Loss:
    """
    What would be lost with the guest of a domain whose hop was interrupted. Nothing is touched.

    :raises SevhopError: it cannot be given up: its hop is in progress, or libvirt has its guest.
    """
    expect_libvirt()
    from .engine import discard as engine

    return await engine.assess(guest, timeout=step_timeout)


async def discard(loss: Loss, *, step_timeout: float = COMMAND_TIMEOUT) -> RecoveredGuest:
    """
    Give up a guest, and remove all traces of its hop: libvirt may start the domain from its disks then.

    :param loss: what somebody has agreed to.
    :raises SevhopError: it is not where it was any more, and nothing was touched; or its process does not exit.
    """
    expect_libvirt()
    from .engine import discard as engine

    return await engine.discard(loss, timeout=step_timeout)


def expect_libvirt() -> None:
    """
    libvirt's Python package is optional, since hops outside libvirt do not need it.

    :raises Refused: it is not installed.
    """
    if importlib.util.find_spec("libvirt") is None:
        raise Refused("libvirt's Python package is missing", "pip install 'sevhop[libvirt]'")


class _Work(Protocol):
    async def run(self) -> Any:
        """Complete it."""

    def interrupt(self) -> bool:
        """Roll it back if possible."""


async def _interruptible(work: _Work, deferring: DeferringListener) -> None:
    """Run it. When cancelled, wait until it is rolled back, or completed if it is committed."""
    cancelled: asyncio.CancelledError | None = None
    try:
        with shutdown_inhibitor.taken("the QEMU of a guest is being replaced"):
            task = asyncio.ensure_future(work.run())
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
        deferring.flush()
