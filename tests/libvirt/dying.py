"""
Kills a process of a keeper at an exact moment. Run inside a daemon's mount namespace, and only there. ::

    dying.py VICTIM MOMENT ARGUMENT...     runs sevhop with these arguments; the victim dies at the moment
    dying.py VICTIM                        kills at once

The state of the keeper is appended to :data:`STATES`. That file must not exist before.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from sevhop.records.run_directory import DOMAINS

STATES = Path("/run/killed-in")

#: Moments of the command: after which call of which class.
CALLS = {
    "held": ("sevhop.libvirt.connection", "Connection", "probe_capabilities"),
    "held with its blocks": ("sevhop.keeper.client", "KeeperClient", "keep_blocks"),
    "waiting": ("sevhop.keeper.client", "KeeperClient", "retire"),
    "over": ("sevhop.libvirt.connection", "Connection", "restore"),
}


_AFTER_CALL = """
import os, signal
import {module}

original = {module}.{call}

async def dying(*arguments, **options):
    result = await original(*arguments, **options)
    try:
        os.close(os.open({states!r}, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return result
    os.kill(os.getpid(), signal.SIGKILL)

{module}.{call} = dying
"""


def after_call(directory: Path, module: str, call: str) -> str:
    """The environment in which the first process that makes this call is killed before it has a result."""
    text = _AFTER_CALL.format(module=module, call=call, states=str(STATES))
    (directory / "sitecustomize.py").write_text(text)
    return f"PYTHONPATH={directory}"


def state() -> str:
    """The state of the only keeper."""
    (link,) = DOMAINS.iterdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as control:
        control.connect(str(link / "control"))
        control.send(b"status")
        answer = control.recv(4096).decode().removeprefix("ok ")
    return str(json.loads(answer)["state"])


def kill(victim: str, wanted: str = "") -> None:
    """Kill the process of this name, and wait for its exit; if a state is wanted, not before that."""
    while (now := state()) != wanted and wanted:
        pass
    with STATES.open("a") as file:
        file.write(now)
    own = os.readlink("/proc/self/ns/mnt")
    (pid,) = (
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and _read(entry / "comm") == victim and _namespace(entry) == own
    )
    ended = os.pidfd_open(pid)
    signal.pidfd_send_signal(ended, signal.SIGKILL)
    select.select([ended], [], [])


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _namespace(entry: Path) -> str:
    try:
        return os.readlink(entry / "ns" / "mnt")
    except OSError:
        return ""


def _kill_after(victim: str, moment: str) -> None:
    module, name, call = CALLS[moment]
    owner = getattr(__import__(module, fromlist=[name]), name)
    original = getattr(owner, call)

    async def dying(*arguments: Any) -> Any:
        result = await original(*arguments)
        kill(victim, wanted=moment.split(" ")[0])
        return result

    setattr(owner, call, dying)


def main(victim: str, moment: str = "", *arguments: str) -> int:
    """The program."""
    if not moment:
        kill(victim)
        return 0
    from sevhop.cli import main as command

    _kill_after(victim, moment)
    return command.main(list(arguments))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
