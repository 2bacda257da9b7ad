"""
Finds the pid file of a running QEMU, which has it open, and locked, for as long as it runs (``os-posix.c``).

Its name on the command line is not enough: it may be relative, and a QEMU that was started with ``-daemonize`` has
changed its directory to ``/``.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import QemuProcess, path_on_disk

from . import command_line
from .command_line import Option


def absolute(process: QemuProcess, argv: list[str]) -> list[str]:
    """
    The arguments of a QEMU (without the program), with the absolute path of its pid file.

    :raises SevhopError: it cannot be found.
    """
    options = command_line.parse(argv)
    options = [_absolute(process, option, options) if option.name == "pidfile" else option for option in options]
    return [argument for option in options for argument in option.argv()]


def _absolute(process: QemuProcess, option: Option, options: list[Option]) -> Option:
    name = option.value or ""
    if not name or os.path.isabs(name):
        return option
    if path := _open_in(process, os.path.basename(name)):
        return Option(option.name, path)
    if any(other.name == "daemonize" for other in options):
        raise SevhopError(
            f"cannot find the pid file {name} of process {process.pid}", "start the guest with its absolute path"
        )
    return option


def _open_in(process: QemuProcess, name: str) -> str:
    """The path of a file of that name that the process has open and that contains its pid; empty without one."""
    wanted = {name, command_line.final_pidfile(name)}
    for descriptor in process.descriptors():
        path = path_on_disk(descriptor.target)
        if not os.path.isabs(path) or os.path.basename(path) not in wanted:
            continue
        with contextlib.suppress(OSError, ValueError):
            # Opened again: QEMU has it open write-only.

            opened = f"/proc/{process.pid}/fd/{descriptor.number}"
            if stat.S_ISREG(os.stat(opened).st_mode) and int(Path(opened).read_bytes()[:32]) == process.pid:
                return path
    return ""
