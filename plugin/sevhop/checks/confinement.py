"""
Whether a destination could be confined as the source is: what can be known before it is started. Once it runs, both are
compared (:mod:`sevhop.process.confinement`).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from ..guest import command_line, emulator
from ..process.confinement import Confinement


def reason_against(source: Confinement, arguments: list[str], environment: Mapping[str, str]) -> str:
    """
    Why a destination could not be confined as the source is; empty when that is known only once it runs.

    :param arguments: of the destination.
    :param environment: of the destination, as the source reports it.
    """
    if reason := _foreign_code(environment):
        return reason
    if source.permitted != source.capabilities_after_exec or source.effective != source.capabilities_after_exec:
        return (
            f"its capabilities are {source.permitted:#x}, but a QEMU that is started by its user gets "
            f"{source.capabilities_after_exec:#x}: it has changed them itself, or its file has capabilities"
        )
    with contextlib.suppress(OSError, KeyError, ValueError):
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        expected = int(status["Seccomp_filters"]) + sandboxed(arguments)
        if expected != source.filters:
            return (
                f"it has {source.filters} seccomp filter(s), the new QEMU would have {expected}: "
                "its -sandbox option is not what the kernel reports, or it was started by a program with a filter"
            )
    return ""


def _foreign_code(environment: Mapping[str, str]) -> str:
    """Who could inject code into the destination before it confines itself (ld.so(8)); empty for nobody."""
    for name, value in environment.items():
        if not name.startswith("LD_") and name not in ("GCONV_PATH", "QEMU_MODULE_DIR"):
            continue
        for path in re.split("[: ;]", value):
            while path.startswith("/") and not os.path.lexists(path):
                path = os.path.dirname(path)  # a user who may write there could create it
            with contextlib.suppress(OSError):
                if path.startswith("/") and (who := emulator.untrusted_writer(path)):
                    return f"{name} in its environment is {value}, and {who}"
    return ""


def sandboxed(arguments: list[str]) -> bool:
    """Whether a QEMU with these arguments installs a seccomp filter (``-sandbox on``)."""
    values = [option.value or "" for option in command_line.parse(arguments) if option.name == "sandbox"]
    if not values:
        return False
    properties = command_line.properties(values[-1])
    return properties.get("", properties.get("enable", "off")) in ("on", "yes", "true", "y")
