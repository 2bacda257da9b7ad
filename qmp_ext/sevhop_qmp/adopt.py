"""
The QMP commands that adopt.so (:mod:`sevhop_qmp.adopt_library`) adds to a destination.

The commands are documented, with units and errors, in ``qmp_ext/adopt/adopt.json``. Each has one function here. They
raise what :meth:`sevhop_qmp.monitor.Monitor.execute` raises: :class:`~sevhop_qmp.errors.CommandError` when the
destination refuses (with its reason), :class:`~sevhop_qmp.errors.MonitorError` when it has exited or does not answer.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from .invalid_data import protocol_errors
from .monitor import Commands, Monitor

#: Name of the descriptor in :func:`use_reboot_mark`.
_REBOOT_MARK = "sevhop-reboot-mark"


class AdoptedRam(NamedTuple):
    """
    What ``x-sev-adopt-ram`` has mapped.

    :ivar mappings: number of mappings of guest memory.
    :ivar size: their size, bytes.
    """

    mappings: int
    size: int


class MoveResult(NamedTuple):
    """
    The result of a move.

    :ivar errno: the kernel's; 0: the context was moved, and the source VM is dead.
    :ivar name: symbolic name of ``errno``, ``OK`` for 0.
    :ivar vcpus: vCPUs whose CPUID was set again after the move.
    :ivar registers: vCPUs whose deferred registers are set now.
    :ivar restore_errno: not 0 when one of these could not be set: the context is here, the guest cannot run.
    """

    errno: int
    name: str
    vcpus: int
    registers: int
    restore_errno: int


class Announcement(NamedTuple):
    """
    The result of an announcement.

    :ivar announced: clients have been informed.
    :ivar missing: otherwise, the first command or function that this QEMU lacks for it, or has in another form.
    """

    announced: bool
    missing: str


class DescriptorSender(Commands, Protocol):
    """Passes commands to a QEMU, and descriptors that commands refer to by name."""

    async def send_fd(self, name: str, fd: int) -> None:
        """See :meth:`sevhop_qmp.monitor.Monitor.send_fd`."""


class AdoptedMemfd(NamedTuple):
    """A memfd of the source that the destination uses: its name, size in bytes, and inode."""

    name: str
    size: int
    inode: int


class AdoptStatus(NamedTuple):
    """
    What a destination has adopted so far.

    :ivar context: ``none``, ``sev`` or ``sev-es``, as the keeper reported.
    :ivar source: ``running`` or ``ended``, as the keeper reported; ``none`` without a keeper.
    :ivar ram: ``none`` (nothing adopted), ``private`` (copies), ``shared`` (the guest's own pages).
    :ivar moved: the SEV context is here.
    :ivar ran: the guest runs here, or has; see :mod:`.run_mark`.
    :ivar finished: the hop is over.
    :ivar announced: ``none``, or the state in which clients see the guest since :func:`announce`: ``paused`` or
        ``running``. The last state before the guest's own was loaded remains.
    :ivar emulated_launch_commands: launch commands emulated in the kernel's place.
    :ivar deferred_regions: encrypted regions that were registered before there was a context.
    :ivar refused_starts: how often the VM was about to run too early.
    :ivar vm_type: as given to KVM_CREATE_VM; 0 is the only one that a destination may have.
    :ivar vcpus: vCPUs that QEMU has created.
    :ivar deferred_registers: vCPUs whose registers are set after the move.
    :ivar vm_dead: the kernel does not serve this QEMU's VM any more: its context was moved into another one.
    :ivar deferred_tap_settings: settings of taps that the source uses; made before the guest runs here.
    :ivar protected_state_offset: see :mod:`.protected_state`; 0 if this QEMU has no such flag.
    :ivar listeners: listening sockets taken over.
    :ivar memfds: memory taken over, in the order in which QEMU asked for it.
    """

    context: str
    source: str
    ram: str
    moved: bool
    ran: bool
    finished: bool
    emulated_launch_commands: int
    deferred_regions: int
    refused_starts: int
    vm_type: int
    vcpus: int
    deferred_registers: int
    protected_state_offset: int
    listeners: int
    memfds: tuple[AdoptedMemfd, ...]
    # A destination that has the library of an earlier package does not report these.
    announced: str = "none"
    deferred_tap_settings: int = 0
    vm_dead: bool = False


async def adopt_ram(monitor: Monitor, stream: str | None = None, header_size: int = 0) -> AdoptedRam:
    """
    Map the guest's own pages instead of the copies. The source must have stopped: from then on the destination's writes
    are the guest's. May be repeated.

    :param stream: name of a descriptor of the stream's pipe, which is consumed: map when the first byte after the
        header arrives there, and notify the keeper before the guest runs. Otherwise map now, and notify nobody.
    :param header_size: bytes.
    """
    arguments = {"stream": stream, "header-size": header_size} if stream else None
    answer: dict[str, Any] = await monitor.execute("x-sev-adopt-ram", arguments)
    with protocol_errors(monitor.name):
        return AdoptedRam(int(answer["mappings"]), int(answer["bytes"]))


async def move_from(monitor: Monitor, name: str) -> MoveResult:
    """
    Move the SEV context of a source VM into the destination. One attempt; see :mod:`sevhop_qmp.move` for the retries.
    A guest that was announced as running (:func:`announce`) runs when that has succeeded, before anything else happens.

    :param name: under which the source's VM descriptor was sent over this monitor. The call consumes it unless it
        raises before it has used it: send the descriptor again before every attempt.
    """
    answer: dict[str, Any] = await monitor.execute("x-sev-migrate-from", {"fd": name})
    with protocol_errors(monitor.name):
        return MoveResult(
            errno=int(answer["errno"]),
            name=str(answer["name"]),
            vcpus=int(answer["vcpus"]),
            registers=int(answer["registers"]),
            restore_errno=int(answer["restore-errno"]),
        )


async def adopt_status(monitor: Commands) -> AdoptStatus:
    """What the library has done so far."""
    answer: dict[str, Any] = await monitor.execute("x-sev-adopt-status")
    with protocol_errors(monitor.name):
        memfds = tuple(AdoptedMemfd(memfd["name"], memfd["size"], memfd["inode"]) for memfd in answer.pop("memfds"))
        return AdoptStatus(memfds=memfds, **{name.replace("-", "_"): value for name, value in answer.items()})


async def announce(monitor: Monitor) -> Announcement:
    """
    Have clients of the destination see the end of its incoming migration (MIGRATION ``completed``) while it waits for
    the state and the guest runs in the source. Until the guest may run here, ``cont`` and ``stop`` of any client are
    remembered: :attr:`AdoptStatus.announced` is what they have asked for. Without an SEV context, the guest runs or is
    paused accordingly when its state has been loaded; with one, when that has been moved here (:func:`move_from`).

    To be called when MIGRATION ``active`` was seen and the header of the stream has been read. This connection
    receives the announced ``completed``, too, before the call returns; a second one follows when the state has been
    loaded. May be repeated, with no effect.
    """
    answer: dict[str, Any] = await monitor.execute("x-sev-adopt-announce")
    with protocol_errors(monitor.name):
        return Announcement(bool(answer["announced"]), str(answer["missing"]))


async def finish(monitor: Monitor) -> None:
    """
    The hop is over: the destination accepts clients on the sockets it has taken over, its stderr goes where the
    source's went, and the keeper is disconnected. Clients that saw the guest announced get the events that correct its
    balloon and its trays. May be repeated.
    """
    await monitor.execute("x-sev-adopt-finish")


async def use_reboot_mark(monitor: DescriptorSender, fd: int) -> None:
    """
    Have the destination record it when it shuts down because of a reboot. May be repeated; the last file counts.

    :param fd: of a file, whose first byte becomes 1 then; stays ours.
    """
    await monitor.send_fd(_REBOOT_MARK, fd)
    await monitor.execute("x-sev-reboot-mark", {"fd": _REBOOT_MARK})
