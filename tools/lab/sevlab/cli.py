"""The command line of tools/lab/run."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tests.support.guests import build

from . import emulator, initramfs, kernels, machine, selinux, wire
from .errors import LabError, LabTimeout

TIMED_OUT = 124  # as timeout(1) has it
LAB_FAILED = 125  # as env(1) and others have it: the failure is not the command's

_DESCRIPTION = """
Boot the SEV lab and run COMMAND in it as root, in the current directory. The machine's file system is there; what
is written to it is lost when the command ends. Temporary directories, /run, /dev/shm
and what libvirt and sevhop keep start empty.
The exit status is the command's; 124: the time limit was reached; 125: the lab itself failed; 126, 127: the command
cannot be executed, or found.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(LAB_FAILED, f"lab: {message}\n")


def _parser() -> _Parser:
    parser = _Parser(prog="tools/lab/run", description=_DESCRIPTION)
    option = parser.add_argument
    option(
        "--kernel",
        choices=list(kernels.SERIES),
        default=kernels.DEFAULT,
        help="its series: %(choices)s; without it %(default)s",
    )
    option("--timeout", type=float, default=300, metavar="S", help="seconds for all of it; %(default)s")
    option("--memory", type=int, default=2048, metavar="MIB", help="size of the lab; %(default)s")
    option("--processors", type=int, default=2, metavar="N", help="of the lab; %(default)s")
    option("--encrypt", action="store_true", help="keep the memory of guests encrypted, so that a copy is garbage")
    policy = "have SELinux, with Debian's policy, in place of AppArmor; permissive at first"
    option("--selinux", action="store_true", help=policy)
    show = "a directory in /tmp, /var/tmp or /run to be visible as well as the project and the current directory"
    option("--show", type=Path, action="append", default=[], metavar="DIRECTORY", help=show)
    option("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="and its arguments")
    return parser


def _environment(series: str) -> dict[str, str]:
    return {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LANG": "C.UTF-8",
        # The file system forgets; and compiling costs time in emulation.
        "PYTHONDONTWRITEBYTECODE": "1",
        "SEVHOP_LAB": series,
        # Here everybody is root, whose cache may be another one.
        "SEVHOP_CACHE": str(build.CACHE),
    }


def _end(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        _parser().error("no command")
    # So that the machine is terminated and incomplete files are removed.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    job = wire.Job(command, os.getcwd(), _environment(options.kernel))
    try:
        with kernels.locked(options.kernel):
            kernel = kernels.obtain(options.kernel)
            base = initramfs.base(kernel)
        size = options.memory, options.processors
        policy = selinux.obtain() if options.selinux else None
        lab = machine.Lab(emulator.obtain(), kernel, *size, options.encrypt, tuple(options.show), policy)
        return machine.run(lab, base, job, options.timeout, _writer(1), _writer(2))
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except LabError as error:
        if error.detail:
            print(error.detail, file=sys.stderr)
        print(f"lab: {error.reason}", file=sys.stderr)
        return TIMED_OUT if isinstance(error, LabTimeout) else LAB_FAILED


def _writer(descriptor: int) -> machine.Sink:
    def write(data: bytes) -> None:
        while data:
            data = data[os.write(descriptor, data) :]

    return write
