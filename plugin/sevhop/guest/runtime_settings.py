"""
What was set in a QEMU since its start, and is neither on its command line nor in its device state.

==========================================  =======================================================================
I/O limits, groups of them                  read, and set in the destination
settings of objects: polling of I/O         read, and set in the destination
threads, throttle groups, filters, ...
thresholds for writing, polling of          read, and set in the destination
a balloon's statistics
actions (``set-action``)                    read from QEMU's memory, since no monitor reports them, and set
forwarded ports (``hostfwd_add``)           read, and added to or removed from the destination
identity of the VM (``vmgenid``, ``auto``)  set on the destination's command line
passwords                                   cannot be read; noted, for whoever must set them again
displays that were moved                    refused
objects, character devices that were added  noted
==========================================  =======================================================================

:func:`read` it from the source, :func:`carry_over` what is different in the destination, which has not run yet. What
cannot be carried over is noted in the report.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

from sevhop_qmp.errors import CommandError
from sevhop_qmp.exported import read_ints
from sevhop_qmp.invalid_data import protocol_errors
from sevhop_qmp.monitor import Commands
from sevhop_qmp.process import QemuProcess

from . import vm_generation_id
from .absent import unless_absent
from .block_queries import query_block, query_named_block_nodes
from .command_line import PRIVATE_MONITOR

#: Of ``query-block``: mandatory and optional arguments of ``block_set_io_throttle``.
_LIMITS = ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")
_MORE_LIMITS = (*(f"{name}_max" for name in _LIMITS), *(f"{name}_max_length" for name in _LIMITS), "iops_size")
#: Properties that can be set of an existing object, by prefix of its type.
_SETTABLE = {
    "iothread": ("poll-max-ns", "poll-grow", "poll-shrink", "aio-max-batch", "thread-pool-min", "thread-pool-max"),
    "main-loop": ("aio-max-batch", "thread-pool-min", "thread-pool-max"),
    "throttle-group": ("limits",),
    "filter-": ("status",),
    "authz-list": ("policy", "rules"),
    "cryptodev-": ("throttle-bps", "throttle-ops"),
}
#: Defaults of an I/O thread. Not the same in all builds of QEMU; then they are set once more, which does no harm.
_POLLING = {"poll-max-ns": 32768, "thread-pool-max": 64}
#: QEMU's variables and their values (qapi/run-state.json), the same ones since 7.2.
_ACTIONS = {
    "reboot": ("reset", "shutdown"),
    "shutdown": ("poweroff", "pause"),
    "panic": ("pause", "shutdown", "exit-failure", "none"),
    "watchdog": ("reset", "shutdown", "poweroff", "pause", "debug", "none", "inject-nmi"),
}
#: Their symbols.
_ACTION_SYMBOLS = {name: f"{name}_action" for name in _ACTIONS} | {"watchdog": "get_watchdog_action"}
_CONTAINERS = ("/machine/peripheral", "/machine/peripheral-anon")
_MONITOR = "monitor-"
_STATISTICS = "guest-stats-polling-interval"
_NETDEV = re.compile(r"^Hub -?\d+ \((?P<id>.*)\):\s*$")
_FORWARD = re.compile(
    r"^\s*(?P<protocol>TCP|UDP)\[HOST_FORWARD\]\s+\S+\s+(?P<host>\S+)\s+(?P<port>\d+)\s+(?P<guest>\S+)\s+(?P<to>\d+)\s"
)
_REMOVED = "removed"
#: Names of the settings in messages.
_NAMES = {
    "throttles": "the throttling",
    "disks": "the drives",
    "objects": "an I/O thread or another object",
    "types": "an object",
    "thresholds": "a write threshold",
    "statistics": "the balloon's statistics",
    "actions": "the action at a reboot, shutdown, panic or watchdog",
    "forwards": "a forwarded port",
    "displays": "a display",
    "tickets": "a display's password",
    "generation": "the VM generation ID",
    "chardevs": "the character devices",
}


@dataclass(frozen=True)
class Settings:
    """
    What is set in one QEMU.

    :ivar throttles: disk (its QOM path, or the name of its drive) → limits, only those that are throttled.
    :ivar disks: all that have a medium.
    :ivar objects: object → its properties that can be set.
    :ivar types: of all objects.
    :ivar thresholds: (driver, file, bytes) of block nodes.
    :ivar statistics: balloon → polling interval of its statistics, in seconds.
    :ivar actions: what happens at a ``reboot``, ``shutdown`` and ``panic``, and when a ``watchdog`` expires, as far as
        it could be read.
    :ivar forwards: ``NETDEV PROTOCOL:HOST:PORT-GUEST:PORT``.
    :ivar displays: VNC display → (authentication, addresses).
    :ivar tickets: whether SPICE requires a password.
    :ivar generation: the VM generation ID, reported to the guest by a ``vmgenid`` device.
    :ivar chardevs: labels.
    """

    throttles: dict[str, dict[str, Any]] = field(default_factory=dict)
    disks: list[str] = field(default_factory=list)
    objects: dict[str, dict[str, Any]] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    thresholds: list[tuple[str, str, int]] = field(default_factory=list)
    statistics: dict[str, int] = field(default_factory=dict)
    actions: dict[str, str] = field(default_factory=dict)
    forwards: list[str] = field(default_factory=list)
    displays: dict[str, tuple[str, list[str]]] = field(default_factory=dict)
    tickets: bool = False
    generation: str = ""
    chardevs: list[str] = field(default_factory=list)

    def before_it_runs(self) -> Settings:
        """
        Only what must be set in a destination of libvirt's before it runs: libvirt itself sets what is in its XML.
        Empty for most guests, so that nothing is queried or set while they are stopped.
        """
        objects = {
            name: {key: value for key, value in settings.items() if value != _POLLING.get(key, 0)}
            for name, settings in self.objects.items()
            if self.types[name] == "iothread"
        }
        objects = {name: settings for name, settings in objects.items() if settings}
        return Settings(throttles=self.throttles, disks=self.disks, objects=objects, thresholds=self.thresholds)

    def without_clients(self) -> Settings:
        """Only what a transit has: no displays, character devices that lead nowhere, and a monitor that is ours."""
        types = {name: kind for name, kind in self.types.items() if not kind.startswith(_MONITOR)}
        return replace(self, types=types, displays={}, tickets=False, chardevs=[])


# -- reading ---------------------------------------------------------------------------------------


async def read(monitor: Commands, process: QemuProcess) -> Settings:
    """
    Read what is set in a QEMU.

    :param process: its process, for what its monitor does not report.
    :raises SevhopError: QEMU does not answer, or its answers make no sense.
    """
    with protocol_errors(monitor.name):
        throttles, disks = _throttles(await query_block(monitor))
        types = dict(await _children(monitor, "/objects"))
        devices = [
            (f"{container}/{name}", kind)
            for container in _CONTAINERS
            for name, kind in await _children(monitor, container)
        ]
        return Settings(
            throttles=throttles,
            disks=disks,
            objects={name: found for name, kind in types.items() if (found := await _object(monitor, name, kind))},
            types=types,
            thresholds=_thresholds(await query_named_block_nodes(monitor)),
            statistics=await _statistics(monitor, devices),
            actions=actions(process),
            forwards=_forwards(await monitor.hmp("info usernet")),
            displays=_displays(await unless_absent(monitor, "query-vnc-servers") or []),
            tickets=(await unless_absent(monitor, "query-spice") or {}).get("auth") == "spice",
            generation=await vm_generation_id.read(monitor),
            chardevs=[str(row["label"]) for row in await monitor.execute("query-chardev")],
        )


async def _children(monitor: Commands, path: str) -> list[tuple[str, str]]:
    rows = await unless_absent(monitor, "qom-list", {"path": path}) or []
    return [(str(row["name"]), row["type"][6:-1]) for row in rows if row["type"].startswith("child<")]


def _disk(row: Mapping[str, Any]) -> str:
    return str(row.get("qdev") or row.get("device", ""))


def _throttles(rows: list[dict[str, Any]]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    found, disks = {}, []
    for row in rows:
        inserted = row.get("inserted")
        if inserted is None or not (name := _disk(row)):
            continue
        disks.append(name)
        limits = {key: inserted[key] for key in (*_LIMITS, *_MORE_LIMITS) if inserted.get(key)}
        if any(key in limits for key in _LIMITS):
            # An implicit group is named like the disk, or not at all.
            found[name] = limits | ({"group": inserted["group"]} if inserted.get("group") else {})
    return found, disks


async def _object(monitor: Commands, name: str, kind: str) -> dict[str, Any]:
    for prefix, names in _SETTABLE.items():
        if kind.startswith(prefix):
            found = {}
            for one in names:
                value = await unless_absent(monitor, "qom-get", {"path": f"/objects/{name}", "property": one})
                if value is not None:
                    found[one] = value
            return found
    return {}


def _thresholds(rows: list[dict[str, Any]]) -> list[tuple[str, str, int]]:
    return [
        (str(row["drv"]), str(row.get("file", "")), int(row["write_threshold"]))
        for row in rows
        if row.get("write_threshold")
    ]


async def _statistics(monitor: Commands, devices: list[tuple[str, str]]) -> dict[str, int]:
    found = {}
    for path, kind in devices:
        if kind.startswith("virtio-balloon"):
            value = await unless_absent(monitor, "qom-get", {"path": path, "property": _STATISTICS})
            if value is not None:
                found[path] = int(value)
    return found


def actions(process: QemuProcess) -> dict[str, str]:
    """
    What happens at a ``reboot``, ``shutdown`` and ``panic``, and when a ``watchdog`` expires.

    :raises ProcessError: the process has exited.
    """
    values = read_ints(process, _ACTION_SYMBOLS)
    return {name: names[value] for name, names in _ACTIONS.items() if 0 <= (value := values.get(name, -1)) < len(names)}


def _forwards(text: str) -> list[str]:
    found, netdev = [], ""
    for line in text.splitlines():
        if head := _NETDEV.match(line):
            netdev = head["id"]
        elif row := _FORWARD.match(line):
            host = "" if row["host"] == "*" else row["host"]
            found.append(f"{netdev} {row['protocol'].lower()}:{host}:{row['port']}-{row['guest']}:{row['to']}")
    return sorted(found)


def _displays(rows: list[dict[str, Any]]) -> dict[str, tuple[str, list[str]]]:
    found = {}
    for row in rows:
        kinds = {str(row.get("auth", "")), str(row.get("vencrypt", ""))}
        addresses = sorted(f"{one['family']} {one['host']} {one['service']}" for one in row.get("server", ()))
        password = any(kind == "vnc" or kind.endswith("-vnc") for kind in kinds)
        found[str(row["id"])] = ("password" if password else "", addresses)
    return found


# -- the destination -------------------------------------------------------------------------------


class _Step(NamedTuple):
    """One thing to be set: its name in messages, and the command."""

    what: str
    command: str
    arguments: dict[str, Any]


async def carry_over(ours: Settings, theirs: Settings, monitor: Commands) -> list[str]:
    """
    Set in a destination what is set in the source and differs.

    :param ours: of the source.
    :param theirs: of the destination.
    :param monitor: of the destination.
    :return: a note for each setting that could not be carried over.
    :raises SevhopError: the destination does not answer, or its answers make no sense.
    """
    notes = []
    with protocol_errors(monitor.name):
        steps = [*_steps(ours, theirs), *await _threshold_steps(ours, theirs, monitor)]
    for step in steps:
        try:
            answer = await monitor.execute(step.command, step.arguments)
            if step.command == "human-monitor-command" and (output := str(answer).strip()) and _REMOVED not in output:
                notes.append(f"cannot set {step.what} in the new QEMU: {output}")
        except CommandError as err:
            notes.append(f"cannot set {step.what} in the new QEMU: {err.message}")
    return notes + not_carried_over(ours, theirs)


async def set_all(ours: Settings, monitor: Commands) -> None:
    """
    Set all of some settings in a destination, without comparing. What it refuses is left for :func:`carry_over`.

    :raises SevhopError: the destination does not answer, or its answers make no sense.
    """
    nothing = Settings(disks=ours.disks, objects={name: {} for name in ours.objects})
    with protocol_errors(monitor.name):
        steps = [*_steps(ours, nothing)]
        with contextlib.suppress(CommandError):
            steps += await _threshold_steps(ours, nothing, monitor)
        for step in steps:
            with contextlib.suppress(CommandError):
                await monitor.execute(step.command, step.arguments)


def _steps(ours: Settings, theirs: Settings) -> Iterator[_Step]:
    for disk in theirs.disks:
        limits, before = ours.throttles.get(disk, {}), theirs.throttles.get(disk, {})
        if disk in ours.disks and limits != before:
            # A disk without a path has the name of its drive.
            arguments = {("id" if disk.startswith("/") else "device"): disk, **dict.fromkeys(_LIMITS, 0), **limits}
            yield _Step(f"the I/O limit of {disk}", "block_set_io_throttle", arguments)
    for name, settings in ours.objects.items():
        for key, value in settings.items():
            if name in theirs.objects and theirs.objects[name].get(key) != value:
                arguments = {"path": f"/objects/{name}", "property": key, "value": value}
                yield _Step(f"{key} of {name}", "qom-set", arguments)
    for path, seconds in ours.statistics.items():
        if theirs.statistics.get(path, seconds) != seconds:
            arguments = {"path": path, "property": _STATISTICS, "value": seconds}
            yield _Step("the polling of the balloon's statistics", "qom-set", arguments)
    changed = {name: value for name, value in ours.actions.items() if theirs.actions.get(name) != value}
    if changed:
        yield _Step(f"the actions at {', '.join(changed)}", "set-action", changed)
    for row in (row for row in theirs.forwards if row not in ours.forwards):
        netdev, _, rule = row.partition(" ")
        line = f"hostfwd_remove {netdev} {rule.partition('-')[0]}"
        yield _Step(f"the removal of the forwarded port {rule}", "human-monitor-command", {"command-line": line})
    for row in (row for row in ours.forwards if row not in theirs.forwards):
        line = f"hostfwd_add {row}"
        yield _Step(f"the forwarded port {row}", "human-monitor-command", {"command-line": line})


async def _threshold_steps(ours: Settings, theirs: Settings, monitor: Commands) -> list[_Step]:
    """A node may have another name in the destination; it is the one with the same driver on the same file."""
    wanted = [row for row in ours.thresholds if row not in theirs.thresholds]
    if not wanted:
        return []
    rows = await query_named_block_nodes(monitor)
    nodes = {(str(row["drv"]), str(row.get("file", ""))): str(row["node-name"]) for row in rows}
    return [
        _Step(
            f"the write threshold of {file}",
            "block-set-write-threshold",
            {"node-name": nodes.get((driver, file), ""), "write-threshold": size},
        )
        for driver, file, size in wanted
    ]


def not_carried_over(ours: Settings, theirs: Settings) -> list[str]:
    """A note for each setting that cannot be carried over, with what to do."""
    notes = []
    for name, (auth, _) in ours.displays.items():
        if auth:
            notes.append(
                f"the password of VNC display {name} cannot be read: set it again (QMP set_password); "
                "until then it is the one that the new QEMU was started with, or no client can log in"
            )
    if ours.tickets:
        notes.append("the password of SPICE cannot be read: it is the one that the new QEMU was started with")
    if unknown := [name for name in _ACTIONS if name not in ours.actions or name not in theirs.actions]:
        notes.append(f"cannot read the actions at {', '.join(unknown)}: repeat QMP set-action if it was used")
    # Since QEMU 11.1 each monitor of the command line is an object.
    monitors = any(kind.startswith(_MONITOR) for kind in theirs.types.values())
    for name, kind in ours.types.items():
        if name not in theirs.types and (monitors or not kind.startswith(_MONITOR)):
            notes.append(f"object {name} ({kind}) was added since the start, and the new QEMU does not have it")
    for label in ours.chardevs:
        if label not in theirs.chardevs and label != PRIVATE_MONITOR:
            notes.append(f"character device {label} was added since the start, and the new QEMU does not have it")
    return notes


def differences(ours: Settings, theirs: Settings) -> list[str]:
    """Differences that cannot be set in a destination any more; empty when a hop may continue."""
    found = []
    for name, (_, addresses) in ours.displays.items():
        others = theirs.displays.get(name, ("", []))[1]
        if addresses != others:
            where = f"at {_listed(others)} in the new QEMU, {_listed(addresses)} in the old QEMU"
            found.append(f"VNC display {name} listens {where}")
    if ours.generation != theirs.generation:
        found.append(
            f"the VM generation ID is {theirs.generation or 'missing'} in the new QEMU, "
            f"{ours.generation or 'missing'} in the old QEMU"
        )
    return found


def changes(before: Settings, now: Settings) -> str:
    """What was changed in the same QEMU; empty when nothing was."""
    names = [one.name for one in fields(Settings) if getattr(before, one.name) != getattr(now, one.name)]
    return _NAMES[names[0]] if names else ""


def _listed(addresses: Sequence[str]) -> str:
    return ", ".join(" ".join(address.split()) for address in addresses) or "nothing"
