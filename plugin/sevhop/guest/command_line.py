"""
The destination's command line, derived from the source's.

It is nearly the same one, since adopt.so lets two QEMUs share memory and listening sockets:

===========================  ==================================================================
dropped                      ``-daemonize`` (sevhop starts it detached), ``-S``, ``-incoming``,
                             ``-loadvm``, and what an earlier hop had added
``-pidfile``                 written under another name, renamed when the source has exited
``server=on`` sockets        do not wait for a client
added                        ``-S -incoming defer`` and a private monitor
===========================  ==================================================================

What cannot be shared, such as a tap device or an inherited descriptor, is listed, with the option, and the hop is
refused before anything is touched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

#: Id of the monitor that sevhop adds to a destination.
PRIVATE_MONITOR = "sevhop-monitor"

# Options of qemu-options.hx that take no argument, of every QEMU from 7.2 on and of those before. One that is missing
# here takes the next option for its argument.
_FLAGS = frozenset(
    """
    S s alt-grab async-teardown audio-help ctrl-grab curses daemonize enable-fips enable-kvm enable-sync-profile
    full-screen h help igd-passthru jitdump mem-prealloc no-acpi no-fd-bootchk no-frame no-hpet no-kvm no-quit no-reboot
    no-shutdown no-user-config nodefaults nographic nouserconfig old-param only-migratable perfmap portrait preconfig
    rtc-td-hack sdl semihosting show-cursor singlestep snapshot tdf usb version win2k-hack xen-attach
    xen-domid-restrict
    """.split()
)

_LEGACY_CHARDEV_OPTIONS = frozenset({"serial", "parallel", "monitor", "qmp", "qmp-pretty", "debugcon", "gdb"})
_SHAREABLE_CHARDEVS = frozenset(
    """
    null vc file pty ringbuf memory socket hub msmouse wctablet testdev spicevmc spiceport qemu-vdagent
    """.split()
)
_SHAREABLE_NETDEVS = frozenset({"user", "hubport", "nic", "none"})
_FD_KEYS = frozenset({"fd", "fds", "vhostfd", "vhostfds", "sockfd"})
#: Names of devices whose backend is a device of the host.
HOST_DEVICES = re.compile(r"(vfio-|vhost-|usb-host$|u2f-passthru$|scsi-generic$)")
#: What QEMU parses as true (qapi_bool_parse).
_TRUE = frozenset({"on", "yes", "true", "y"})
_PIDFILE_SUFFIX = re.compile(r"\.hop-[0-9a-f]{8}$")


#: The option that names the machine type.
_MACHINE = ("machine", "M")


class Option(NamedTuple):
    """One option: its name without dashes (empty for a bare disk image), and its argument if it takes one."""

    name: str
    value: str | None = None

    def argv(self) -> list[str]:
        """Its arguments on a command line."""
        if not self.name:
            return [self.value or ""]
        return [f"-{self.name}"] + ([] if self.value is None else [self.value])

    def properties(self) -> dict[str, str]:
        """See :func:`properties`."""
        return properties(self.value or "")

    @property
    def is_json(self) -> bool:
        """Whether its argument is in JSON."""
        return (self.value or "").startswith("{")

    def without(self, key: str) -> Option:
        """The option without one of its keys."""
        if self.is_json:
            tree = json.loads(self.value or "")
            tree.pop(key, None)
            return Option(self.name, json.dumps(tree))
        props = self.properties()
        props.pop(key, None)
        return Option(self.name, _joined(props))

    def with_property(self, key: str, value: str) -> Option:
        """The option with one more key."""
        if self.is_json:
            return Option(self.name, json.dumps(json.loads(self.value or "") | {key: value}))
        return Option(self.name, _joined(self.properties() | {key: value}))

    def __str__(self) -> str:
        return " ".join(self.argv())


@dataclass(frozen=True)
class Derived:
    """
    A command line for the destination.

    :ivar emulator: the program.
    :ivar arguments: for the destination, without the program.
    :ivar refused: for each option that cannot be shared, the option and why.
    :ivar pidfile: (path at first, path after the hop), if there is one.
    """

    emulator: str
    arguments: list[str]
    refused: list[str] = field(default_factory=list)
    pidfile: tuple[str, str] | None = None


def parse(argv: list[str]) -> list[Option]:
    """Split the arguments of a QEMU (without the program) into options."""
    options = []
    iterator = iter(argv)
    for argument in iterator:
        if not argument.startswith("-") or argument == "-":
            options.append(Option("", argument))
            continue
        name = argument[2:] if argument.startswith("--") else argument[1:]
        options.append(Option(name) if name in _FLAGS else Option(name, next(iterator, "")))
    return options


def _joined(props: Mapping[str, str]) -> str:
    """The reverse of :func:`properties`."""
    pairs = ((key, value.replace(",", ",,")) for key, value in props.items())
    return ",".join(f"{key}={value}" if key else value for key, value in pairs)


def properties(value: str) -> dict[str, str]:
    """
    The keys of an option's argument, in QEMU's ``key=value,...`` or JSON form. A first value without a key is under
    ``""``; a later key without a value is a boolean. Nested JSON becomes ``a.b``.
    """
    if value.startswith("{"):
        try:
            return dict(_flatten(json.loads(value)))
        except ValueError:
            return {}
    result: dict[str, str] = {}
    # A comma is doubled where it is part of a value.
    for position, part in enumerate(re.split(r"(?<!,),(?!,)", value)):
        key, equals, text = part.replace(",,", ",").partition("=")
        if equals:
            result[key] = text
        else:
            result["" if position == 0 else key] = key if position == 0 else "on"
    return result


def memory_backends(argv: list[str]) -> set[str]:
    """The ids of the memory backends among the arguments of a QEMU (without the program)."""
    objects = [properties(option.value or "") for option in parse(argv) if option.name == "object"]
    kinds = {props.get("id", ""): props.get("", props.get("qom-type", "")) for props in objects}
    return {name for name, kind in kinds.items() if kind.startswith("memory-backend-")}


def _flatten(tree: object, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, bool):
        yield prefix, "on" if tree else "off"
    else:
        yield prefix, str(tree)


def derive(emulator: str, argv: list[str], token: str) -> Derived:
    """
    Derive the destination's arguments from the source's.

    :param emulator: the destination's program.
    :param argv: the source's arguments, without the program.
    :param token: eight hexadecimal digits that nobody can guess, for the name of a temporary file.
    """
    options = parse(argv)
    arguments: list[str] = []
    refused: list[str] = []
    pidfile = None
    for option in options:
        if _dropped(option):
            continue
        if reason := _reason_against(option, options):
            refused.append(f"{option}: {reason}")
        if option.name == "pidfile" and option.value:
            final = final_pidfile(option.value)
            temporary = f"{final}.hop-{token}"
            pidfile = (temporary, final)
            arguments += ["-pidfile", temporary]
        else:
            arguments += _without_waiting(option).argv()
    return Derived(emulator, arguments, refused, pidfile)


def with_machine_type(arguments: list[str], machine_type: str) -> list[str]:
    """
    The arguments of a destination with the guest's own machine type. An alias (``q35``), or none, is another machine
    type in each version of QEMU.

    :param machine_type: as the source reports it.
    """
    options = parse(arguments)
    result: list[str] = []
    named = False
    for option in options:
        key = "" if "" in option.properties() else "type"
        if option.name in _MACHINE and key in option.properties():
            named = True
            result += option.with_property(key, machine_type).argv()
        else:
            result += option.argv()
    return result if named else [*result, "-machine", f"type={machine_type}"]


def final_pidfile(name: str) -> str:
    """The name of a pid file after the hop in which it was written."""
    return _PIDFILE_SUFFIX.sub("", name)


def incoming(arguments: list[str], monitor_fd: int, *, paused: bool = True) -> list[str]:
    """
    Add the options of a destination: it waits for the stream, and has a private monitor.

    :param monitor_fd: an inherited listening socket for the monitor.
    :param paused: whether it stays paused at the end of the stream.
    """
    kept = [argument for option in parse(arguments) if not _dropped(option) for argument in option.argv()]
    return [
        *kept,
        *("-chardev", f"socket,id={PRIVATE_MONITOR},fd={monitor_fd},server=on,wait=off"),
        *("-mon", f"chardev={PRIVATE_MONITOR},mode=control"),
        *(["-S"] if paused else []),
        *("-incoming", "defer"),
    ]


def _dropped(option: Option) -> bool:
    if option.name in ("daemonize", "S", "incoming", "loadvm"):
        return True
    if option.name == "chardev" and option.value:
        return properties(option.value).get("id") == PRIVATE_MONITOR
    return option.name == "mon" and option.value is not None and f"chardev={PRIVATE_MONITOR}" in option.value


def _without_waiting(option: Option) -> Option:
    """A server socket must not delay the destination's start until a client connects."""
    value = option.value
    if value is None or not (option.name == "chardev" or option.name in _LEGACY_CHARDEV_OPTIONS):
        return option
    if not _chardev_is_server(value):
        return option
    if value.startswith("{"):
        tree = json.loads(value)
        tree["backend"]["data"]["wait"] = False
        return Option(option.name, json.dumps(tree))
    parts = [part for part in value.split(",") if part not in ("wait", "nowait") and not part.startswith("wait=")]
    return Option(option.name, ",".join([*parts, "wait=off"]))


def _chardev_is_server(value: str) -> bool:
    props = properties(value)
    if value.startswith("{"):
        # The QMP form, in which a socket is a server by default.
        return props.get("backend.type") == "socket" and props.get("backend.data.server", "on") == "on"
    return props.get("server") == "on"


def _reason_against(option: Option, options: list[Option]) -> str:
    """Why an option cannot be shared by two QEMUs; empty when it can."""
    name, value = option.name, option.value or ""
    if any(other.name == "daemonize" for other in options) and (path := _relative_log(option)):
        return f"{path} is relative to a directory that -daemonize has left"
    props = properties(value)
    if name == "add-fd" or _FD_KEYS & {key.rsplit(".", 1)[-1] for key in props} or "/dev/fdset/" in value:
        return "a descriptor that the old QEMU inherited cannot be inherited again"
    if name in ("netdev", "nic", "net"):
        kind = props.get("", props.get("type", ""))
        if kind not in _SHAREABLE_NETDEVS:
            return f"a {kind} network backend cannot be opened twice"
    if name == "snapshot" or props.get("snapshot") in _TRUE:
        return "a temporary snapshot belongs to one process"
    if name == "tpmdev":
        return "a TPM serves one QEMU only"
    if name in ("curses",) or (name == "display" and value.startswith("curses")):
        return "the terminal belongs to the old QEMU"
    if name == "nographic" and _nographic_takes_stdio(options):
        return "standard input and output belong to the old QEMU"
    if name == "vnc" and "reverse" in props:
        return "a VNC viewer that was called back cannot be handed over"
    if name == "device":
        driver = props.get("", props.get("driver", ""))
        if HOST_DEVICES.match(driver):
            return f"the host device behind {driver} cannot be opened twice"
        if driver.startswith("virtio-mem-"):
            return "QEMU discards its contents when it starts"
    if name == "chardev":
        kind = props.get("", props.get("backend", props.get("backend.type", "")))
        return _reason_against_chardev(kind, value)
    if name == "gdb" and value.startswith(("tcp:", "unix:")):
        return ""  # a gdb stub always listens, without server=on
    if name in _LEGACY_CHARDEV_OPTIONS:
        return _reason_against_legacy_chardev(value)
    return ""


def _relative_log(option: Option) -> str:
    """The relative path of a file that QEMU writes to, and would create in another directory; empty without one."""
    value = option.value or ""
    props = properties(value)
    paths = [path for key, path in props.items() if key.rsplit(".", 1)[-1] == "logfile"]
    if option.name == "D":
        paths.append(value)
    if option.name == "chardev" and props.get("", props.get("backend", props.get("backend.type", ""))) == "file":
        paths += [path for key, path in props.items() if key.rsplit(".", 1)[-1] in ("path", "out")]
    if option.name in _LEGACY_CHARDEV_OPTIONS and value.startswith("file:"):
        paths.append(value.removeprefix("file:"))
    return next((path for path in paths if path and not path.startswith("/")), "")


def _reason_against_chardev(kind: str, value: str) -> str:
    if kind == "stdio":
        return "standard input and output belong to the old QEMU"
    if kind not in _SHAREABLE_CHARDEVS:
        return f"a {kind} character device cannot be opened twice"
    if kind == "socket" and not _chardev_is_server(value):
        return "its peer expects one client, not two"
    return ""


def _reason_against_legacy_chardev(value: str) -> str:
    value = value.removeprefix("mon:")
    kind = re.split(r"[:,]", value, maxsplit=1)[0]
    if kind in ("none", "chardev", "con") or value == "":
        return ""
    if kind in ("unix", "tcp", "telnet", "websocket"):
        return _reason_against_chardev("socket", value)
    return _reason_against_chardev(kind, value)


def _nographic_takes_stdio(options: list[Option]) -> bool:
    """-nographic redirects serial port and monitor to stdio unless they are given (system/vl.c)."""

    names = {option.name for option in options}
    if "nodefaults" in names:
        return False
    return "serial" not in names or not names & {"monitor", "qmp", "qmp-pretty", "mon"}
