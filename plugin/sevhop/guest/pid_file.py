"""
Where the pid file of a running QEMU is. QEMU has it open, and locked, for as long as it runs (``os-posix.c``).

Its name on the command line does not tell: it may be relative, and a QEMU that was started with ``-daemonize`` is in
``/`` since, whatever directory it was started in.
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


def absolute(process: QemuProcess, words: list[str]) -> list[str]:
    """
    The arguments of a QEMU (without the program), with the whole path of its pid file.

    :raises SevhopError: nobody knows in which directory that is.
    """
    options = command_line.parse(words)
    options = [_absolute(process, option, options) if option.name == "pidfile" else option for option in options]
    return [word for option in options for word in option.words()]


def _absolute(process: QemuProcess, option: Option, options: list[Option]) -> Option:
    name = option.value or ""
    if not name or os.path.isabs(name):
        return option
    if path := _open_in(process, os.path.basename(name)):
        return Option(option.name, path)
    if any(other.name == "daemonize" for other in options):
        raise SevhopError(
            f"the pid file {name} of process {process.pid} is not to be found", "start the guest with its whole path"
        )
    return option


def _open_in(process: QemuProcess, name: str) -> str:
    """Where a file of that name is that the process has open, and that says its number; empty if nowhere."""
    wanted = {name, command_line.final_pidfile(name)}
    for descriptor in process.descriptors():
        path = path_on_disk(descriptor.target)
        if not os.path.isabs(path) or os.path.basename(path) not in wanted:
            continue
        with contextlib.suppress(OSError, ValueError):
            # Opened anew: QEMU has it open for writing alone.
            opened = f"/proc/{process.pid}/fd/{descriptor.number}"
            if stat.S_ISREG(os.stat(opened).st_mode) and int(Path(opened).read_bytes()[:32]) == process.pid:
                return path
    return ""
