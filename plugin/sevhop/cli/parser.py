"""The arguments of every command."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..options import HopOptions, RecoverOptions, Window
from . import selection

#: Each job needs a few threads and, for a moment, a second QEMU.
MAX_JOBS = 64
#: Longest timeout, seconds.
_DAY = 86400


class _Parser(argparse.ArgumentParser):
    """One that reports wrong usage with ``--json`` as every other error."""

    _arguments: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._arguments = sys.argv[1:] if args is None else args
        found = super().parse_known_args(args, namespace)
        if self.get_default("command") == "hop":
            self._verify_destination(found[0])
        return found

    def _verify_destination(self, options: argparse.Namespace) -> None:
        """
        An emulator alone would be a whole command line, and a script's variable that is not set none. Whether there was
        a ``--`` argparse does not report.
        """
        separated = "--" in self._arguments
        if options.destination and not separated:
            self.error(f"{options.destination[0]}: give --emulator PATH, or the new QEMU's whole command line after --")
        if separated and not options.destination:
            self.error("after -- there is no command line")
        if options.emulator and options.destination:
            self.error("--emulator goes without a command line, which names the emulator")

    def error(self, message: str) -> NoReturn:
        arguments = list(self._arguments)
        if "--json" in arguments[: arguments.index("--") if "--" in arguments else None]:
            from .output import error_object

            print(json.dumps(error_object(self.prog.removeprefix("sevhop").strip(), message)))
        super().error(message)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        # argparse would print Python's list of them.
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, f"invalid value: {value}: give one of {', '.join(action.choices)}")


class _Version(argparse.Action):
    """Prints the version, which takes longer to find than everything else that ``--help`` needs."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib import metadata

        try:
            version = metadata.version("sevhop")
        except metadata.PackageNotFoundError:
            version = "(not installed)"
        print(f"sevhop {version}")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """The arguments of every command."""
    top = _Parser(prog="sevhop", description="Replace the QEMU process under running guests, without rebooting them.")
    top.add_argument("--version", action=_Version, nargs=0, help="show program's version number and exit")
    top.add_argument("--verbose", "-v", action="store_true", help="log each step to standard error")
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    hop = commands.add_parser(
        "hop",
        help="replace the QEMU of a guest outside libvirt",
        description="Replace the QEMU process behind a QMP socket without rebooting its guest. Domains of libvirt are "
        "for sevhop upgrade.",
    )
    hop.add_argument("--qmp", required=True, type=Path, metavar="PATH", help="QMP socket of the running QEMU")
    hop.add_argument(
        "--emulator",
        type=_path,
        metavar="PATH",
        help="QEMU binary to hop to (default: the old QEMU's, as it is on disk now)",
    )
    _add_seconds(hop, "--start-timeout", HopOptions.start_timeout, "for the new QEMU to start")
    _add_seconds(
        hop, "--move-deadline", HopOptions.move_deadline, "for which a busy move of the SEV context is retried"
    )
    hop.add_argument(
        "destination",
        nargs="*",
        metavar="COMMAND",
        help="after --: the new QEMU's whole command line (default: the old QEMU's own)",
    )
    hop.set_defaults(command="hop")

    upgrade = commands.add_parser(
        "upgrade",
        help="replace the QEMU of libvirt domains",
        description="Replace the QEMU process of libvirt domains without rebooting them. Each domain keeps its name, "
        "UUID and definition; only the emulator changes. A DOMAIN is a name, a UUID or an id; all are looked up "
        "before the first is touched. At most --jobs domains are stopped at a time. After a failure, or after a named "
        "domain was refused, no further upgrade begins; those in progress are completed. With --all and --outdated, "
        "domains that cannot hop are skipped and reported. SIGINT, SIGTERM, SIGQUIT and SIGHUP roll back all upgrades "
        "in progress. The exit status is that of the most severe outcome; a skipped domain counts as 1.",
    )
    upgrade.add_argument("domains", nargs="*", metavar="DOMAIN")
    upgrade.add_argument("--all", action="store_true", help="all active domains")
    upgrade.add_argument(
        "--outdated",
        action="store_true",
        help="all active domains whose QEMU is another version than is installed, or was replaced on disk",
    )
    upgrade.add_argument(
        "--emulator",
        type=_path,
        metavar="PATH",
        help="QEMU binary to hop to (default: the domain's own, as it is on disk now)",
    )
    upgrade.add_argument("--dry-run", action="store_true", help="check only; nothing is touched")
    upgrade.add_argument(
        "--no-transit",
        action="store_true",
        help="suspend the guest until libvirt has restored it, instead of having it run in a QEMU beside libvirt "
        "meanwhile; as it is done with a domain for which the latter is not possible",
    )
    upgrade.add_argument(
        "--no-rehearsal",
        action="store_true",
        help="without a transit: skip the rehearsal, in which the new QEMU loads a copy of the device state, and the "
        "guest stops briefly",
    )
    upgrade.add_argument(
        "--jobs", type=_count, default=1, metavar="N", help="domains to upgrade at a time (default: %(default)s)"
    )
    selection.add_exclude(upgrade, "--all", "--outdated")
    upgrade.add_argument("--keep-going", action="store_true", help="begin further upgrades after a failure or refusal")
    upgrade.add_argument(
        "--max-failures",
        type=_count,
        default=1,
        metavar="N",
        help="begin no further upgrade, also with --keep-going, when N guests were lost or need a recovery "
        "(default: %(default)s)",
    )
    upgrade.add_argument(
        "--window",
        type=_window,
        metavar="HH:MM-HH:MM",
        help="begin upgrades at that time of day only; one that has begun is completed",
    )
    upgrade.add_argument(
        "--prepare",
        action="store_true",
        help="stop when the guest runs in the transit, or is suspended in the keeper; sevhop recover DOMAIN, or virsh "
        "restore, completes it",
    )
    upgrade.set_defaults(command="upgrade", misused=upgrade.error)

    examine = commands.add_parser(
        "check", help="check whether a guest can hop", description="Check whether a guest can hop. Nothing is touched."
    )
    which = examine.add_mutually_exclusive_group(required=True)
    which.add_argument("domain", nargs="?", metavar="DOMAIN", help="libvirt domain")
    which.add_argument("--qmp", type=Path, metavar="PATH", help="QMP socket of a QEMU outside libvirt")
    examine.add_argument(
        "--emulator",
        type=_path,
        metavar="PATH",
        help="QEMU binary to hop to (default: the guest's own, as it is on disk now)",
    )
    examine.set_defaults(command="check")

    prepare = commands.add_parser(
        "prepare",
        help="change the definitions of libvirt domains so that they can hop",
        description="Change the persistent definition of libvirt domains so that their guests can hop when they were "
        "shut down and started again, and show the difference. Running domains are not touched. A DOMAIN is a name, a "
        "UUID or an id; all are looked up before the first is changed. A definition that has everything is not "
        "changed. The exit status is 1 if a domain was refused.",
    )
    prepare.add_argument("domains", nargs="*", metavar="DOMAIN")
    prepare.add_argument("--all", action="store_true", help="all domains that are defined, active or not")
    prepare.add_argument("--dry-run", action="store_true", help="show the difference only; nothing is changed")
    selection.add_exclude(prepare, "--all")
    prepare.set_defaults(command="prepare", misused=prepare.error)

    status = commands.add_parser(
        "status",
        help="show which QEMU runs each domain",
        description="Show for each active domain which QEMU runs it, which one is installed, whether it can hop, and "
        "any hop in progress; also each hop of a guest outside libvirt that is in progress or was interrupted. The "
        "exit status is 4 if a hop waits for sevhop recover or for virsh restore, or if a journal cannot be read.",
    )
    status.add_argument("domains", nargs="*", metavar="DOMAIN", help="default: all active domains")
    status.set_defaults(command="status")

    recover = commands.add_parser(
        "recover",
        help="complete or roll back interrupted hops",
        description="Complete or roll back every interrupted hop: its guest then runs in the new QEMU, or in the old "
        "one. Safe at any time, also when no hop was interrupted.",
    )
    recover.add_argument("guests", nargs="*", metavar="DOMAIN", help="domain, or guest outside libvirt (default: all)")
    _add_recover_options(recover)
    recover.set_defaults(command="recover", misused=recover.error)

    for command in (hop, upgrade, recover):
        _add_seconds(command, "--timeout", HopOptions.step_timeout, "for each step")

    for command in (upgrade, recover):
        command.add_argument(
            "--no-set-time",
            action="store_true",
            help="do not have the guest agent set the clock of a guest that was stopped for more than a second",
        )

    for command in (upgrade, examine, prepare, status):
        command.add_argument("--connect", metavar="URI", help="libvirt connection (default: qemu:///system)")

    for command in (hop, upgrade, status):
        command.add_argument(
            "--metrics-dir", type=Path, metavar="DIR", help="update the Prometheus metrics in DIR/sevhop.prom"
        )

    install = commands.add_parser(
        "install",
        help="install the libvirt hook",
        description="Install the libvirt hook, rules for AppArmor, a policy module for SELinux, and systemd units; "
        "verify that libvirt calls the hook.",
    )
    install.add_argument(
        "--verify",
        action="store_true",
        help="install nothing: verify that libvirt calls the hook, and that its QEMU can load the library",
    )
    install.set_defaults(command="install")
    uninstall = commands.add_parser(
        "uninstall", help="remove the libvirt hook", description="Remove the hook, the rules and the units."
    )
    uninstall.set_defaults(command="uninstall")

    for command in (hop, upgrade, examine, prepare, status, recover, install, uninstall):
        command.add_argument("--json", action="store_true", help="print one JSON object, errors included")
    return top


def _add_recover_options(recover: argparse.ArgumentParser) -> None:
    recover.add_argument(
        "--emulator",
        metavar="PATH",
        help="restore one DOMAIN in this QEMU binary, instead of those that its hop has recorded; it is checked before "
        "anything is touched",
    )
    recover.add_argument(
        "--discard",
        action="store_true",
        help="give up the guest of one DOMAIN, which is lost as by a power failure, when it can neither be completed "
        "nor rolled back; asks on a terminal",
    )
    recover.add_argument("--yes", action="store_true", help="with --discard: do not ask")
    recover.add_argument(
        "--unattended",
        action="store_true",
        help="as the timer does it: try hops whose recovery has failed less and less often, and apply --max-age",
    )
    recover.add_argument(
        "--max-age",
        type=_seconds,
        metavar="S",
        help="seconds after which a guest that is suspended in the keeper is not restored (default: no limit; with "
        f"--unattended {RecoverOptions.UNATTENDED_AGE:g}); one that runs in the transit has no age",
    )


def _add_seconds(command: argparse.ArgumentParser, option: str, default: float, purpose: str) -> None:
    command.add_argument(
        option, type=_seconds, default=default, metavar="S", help=f"seconds {purpose} (default: %(default)g)"
    )


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < _DAY:
            return value
    raise argparse.ArgumentTypeError(f"invalid value: {text}: give seconds, above 0 and below {_DAY}")


def _window(text: str) -> Window:
    try:
        return Window.parse(text)
    except ValueError as err:
        raise argparse.ArgumentTypeError(f"invalid value: {err}") from err


def _path(text: str) -> str:
    # A script's variable that is not set would mean the default.
    if not text:
        raise argparse.ArgumentTypeError("it is empty: name a file")
    return text


def _count(text: str) -> int:
    with contextlib.suppress(ValueError):
        if 0 < (value := int(text)) <= MAX_JOBS:
            return value
    raise argparse.ArgumentTypeError(f"invalid value: {text}: give a number from 1 to {MAX_JOBS}")
