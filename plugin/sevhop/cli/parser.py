"""The arguments of every command."""

from __future__ import annotations

import argparse
from importlib import metadata
from pathlib import Path

from sevhop_qmp.monitor import COMMAND_TIMEOUT

from ..engine.destination import START_TIMEOUT

#: Each takes a few threads and, for a moment, a second QEMU.
MOST_JOBS = 64


def parser() -> argparse.ArgumentParser:
    """The arguments of every command."""
    top = argparse.ArgumentParser(
        prog="sevhop", description="Replace the QEMU process under a running guest, SEV guests included."
    )
    top.add_argument("--version", action="version", version=f"%(prog)s {metadata.version('sevhop')}")
    top.add_argument("--verbose", "-v", action="store_true", help="log what is done, to standard error")
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    hop = commands.add_parser(
        "hop",
        help="hop a guest that runs outside libvirt",
        description="Replace the QEMU behind a QMP socket by a new one, while its guest goes on.",
    )
    hop.add_argument("--source", required=True, type=Path, metavar="PATH", help="QMP socket of the running QEMU")
    hop.add_argument(
        "--emulator", metavar="PATH", help="the QEMU to hop to (default: the source's, as it is on disk now)"
    )
    hop.add_argument("--json", action="store_true", help="print one JSON object, errors included")
    hop.add_argument(
        "--start-timeout",
        type=_seconds,
        default=START_TIMEOUT,
        metavar="S",
        help="seconds in which the new QEMU must come up (default: %(default)g)",
    )
    hop.add_argument(
        "--move-deadline",
        type=_seconds,
        default=2.0,
        metavar="S",
        help="seconds for which a busy migration is tried again (default: %(default)g)",
    )
    hop.add_argument(
        "destination",
        nargs="*",
        metavar="COMMAND",
        help="after --: the destination's whole command line (default: the source's own)",
    )
    hop.set_defaults(command="hop")

    upgrade = commands.add_parser(
        "upgrade",
        help="hop domains of libvirt",
        description="Replace the QEMU of libvirt domains by a new one, while their guests go on. Each domain keeps its "
        "name, UUID and definition; only the emulator changes.",
        epilog="No more domains are stopped at a time than --jobs allows. After a failure no further one is begun, nor "
        "after a domain that was named is refused; those under way go on to their ends. With --all and --outdated, "
        "domains that cannot hop are told and left out. SIGINT, SIGTERM, SIGQUIT and SIGHUP undo all that are under "
        "way. The exit status is that of the domain that fared worst: 1 also if one was left out.",
    )
    upgrade.add_argument("domains", nargs="*", metavar="DOMAIN")
    upgrade.add_argument("--all", action="store_true", help="all active domains")
    upgrade.add_argument(
        "--outdated",
        action="store_true",
        help="all active domains whose QEMU is another version than is installed, or was replaced on disk",
    )
    upgrade.add_argument(
        "--emulator", metavar="PATH", help="the QEMU to hop to (default: the domain's own, as it is on disk now)"
    )
    upgrade.add_argument("--dry-run", action="store_true", help="check only; nothing is rehearsed")
    upgrade.add_argument(
        "--no-rehearsal",
        action="store_true",
        help="do not have the new QEMU load a trial copy of the device state first, which pauses the guest briefly",
    )
    upgrade.add_argument(
        "--jobs", type=_count, default=1, metavar="N", help="domains to upgrade at a time (default: %(default)s)"
    )
    upgrade.add_argument(
        "--keep-going", action="store_true", help="begin further domains when one fails or is refused"
    )
    upgrade.add_argument(
        "--prepare", action="store_true", help="stop when the guest is held; virsh restore goes on with it"
    )
    upgrade.set_defaults(command="upgrade", misused=upgrade.error)

    examine = commands.add_parser(
        "check", help="tell whether a guest can hop", description="Tell whether a guest can hop. Nothing is touched."
    )
    which = examine.add_mutually_exclusive_group(required=True)
    which.add_argument("domain", nargs="?", metavar="DOMAIN", help="domain of libvirt")
    which.add_argument("--qmp", type=Path, metavar="PATH", help="QMP socket of a QEMU outside libvirt")
    examine.add_argument("--emulator", metavar="PATH", help="the QEMU to hop to")
    examine.set_defaults(command="check")

    status = commands.add_parser(
        "status",
        help="tell which QEMU runs each domain",
        description="Tell for each active domain which QEMU runs it, which one is installed, whether it can hop, and "
        "whether a hop is under way.",
    )
    status.add_argument("domains", nargs="*", metavar="DOMAIN", help="default: all active ones")
    status.set_defaults(command="status")

    mend = commands.add_parser(
        "recover",
        help="finish or undo hops that were broken off",
        description="Bring every hop that was broken off to its end: the guest runs in its old QEMU, or in the new "
        "one. Safe at any time, also when nothing is wrong.",
    )
    mend.add_argument("guests", nargs="*", metavar="DOMAIN", help="default: all")
    mend.add_argument("--json", action="store_true", help="print one JSON object, errors included")
    mend.set_defaults(command="recover")

    for command in (hop, upgrade, mend):
        command.add_argument(
            "--timeout",
            type=_seconds,
            default=COMMAND_TIMEOUT,
            metavar="S",
            help="seconds for each step (default: %(default)g)",
        )

    for command in (upgrade, examine, status):
        command.add_argument("--connect", metavar="URI", help="libvirt (default: qemu:///system)")
        command.add_argument("--json", action="store_true", help="print one JSON object, errors included")

    for command in (hop, upgrade, status):
        command.add_argument(
            "--metrics-dir", type=Path, metavar="DIR", help="add to the metrics for Prometheus in DIR/sevhop.prom"
        )

    install = commands.add_parser(
        "install", help="install libvirt's hook", description="Install the hook, and see that libvirt calls it."
    )
    install.set_defaults(command="install")
    uninstall = commands.add_parser("uninstall", help="remove libvirt's hook", description="Remove the hook again.")
    uninstall.set_defaults(command="uninstall")
    return top


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 86400:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds")
    return value


def _count(text: str) -> int:
    value = int(text)
    if not 0 < value <= MOST_JOBS:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 to {MOST_JOBS}")
    return value
