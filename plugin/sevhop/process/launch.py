"""
Starts a QEMU with the credentials of another one: same user, same capabilities, same limits, same cgroups.

The new process applies them to itself (:mod:`sevhop.process.launcher`) before it executes QEMU, so that QEMU never runs
with more privileges than the old one. If anything cannot be applied, the start fails.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from sevhop_qmp import adopt_library

from .confinement import Confinement
from .scheduling import Thread

_PROGRAM = Path(__file__).with_name("launcher.py")
#: How the program begins the only line that it prints, if the credentials cannot be applied.
CANNOT_APPLY = "sevhop: cannot apply "
#: The OOM killer kills a process with this first (proc(5)): the guest is in the other QEMU.
FIRST_TO_DIE = 1000


class Identity(NamedTuple):
    """
    What is applied to a new QEMU.

    :ivar scheduling: of the first thread, from which the others inherit it.
    """

    confinement: Confinement
    scheduling: Thread


def spawn(
    command: Sequence[str],
    environment: Mapping[str, str],
    identity: Identity,
    *,
    directory: int | None = None,
    cgroups: Sequence[str] = (),
    namespaces: Sequence[int] = (),
    keep: Sequence[int] = (),
    gate: int | None = None,
    ends_with_us: bool = False,
    stdin: int | IO[bytes] = subprocess.DEVNULL,
    stdout: int | IO[bytes] = subprocess.DEVNULL,
    stderr: int | IO[bytes] = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """
    Start it. The returned process executes QEMU itself; if that fails, the reason is in its standard error.

    :param command: absolute path of the program, and its arguments.
    :param directory: descriptor of its working directory, so that renaming a directory in its path has no effect.
    :param cgroups: directories of the cgroups that it joins.
    :param namespaces: descriptors of those that it enters (setns(2)).
    :param keep: descriptors that it inherits.
    :param gate: descriptor of a pipe: it does not execute QEMU before there is a byte to be read. QEMU opens its
        files then, and which devices it may open is decided by the cgroup in which it is at that moment.
    :param ends_with_us: whether it is killed when the calling thread ends, however that comes to pass.
    :raises OSError, subprocess.SubprocessError: no process can be created.
    """
    specification = _specification(identity, directory, cgroups)
    specification |= {"command": list(command), "environment": dict(environment), "namespaces": list(namespaces)}
    specification |= {"gate": gate, "ends_with_parent": os.getpid() if ends_with_us else None}
    spec = os.memfd_create("sevhop-launch", 0)
    try:
        with os.fdopen(spec, "wb", closefd=False) as file:
            marshal.dump(specification, file)
        os.lseek(spec, 0, os.SEEK_SET)
        return subprocess.Popen(
            [_python(), "-I", "-S", str(_PROGRAM), str(spec)],
            cwd="/",
            env={},  # it is root: nothing from the source's environment
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            pass_fds=[spec, *keep, *namespaces, *(fd for fd in (directory, gate) if fd is not None)],
            start_new_session=True,
        )
    finally:
        os.close(spec)


def kill_session(child: subprocess.Popen[bytes]) -> None:
    """
    Kill a child of ours that has a session of its own, and whatever it has started there: it may be a script. Nothing
    happens if it was reaped, since another process may have its pid then.
    """
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


def inheritable(environment: dict[str, str]) -> dict[str, str]:
    """An environment without the variables of an earlier hop."""
    kept = {name: value for name, value in environment.items() if not name.startswith("SEVHOP_")}
    preload = kept.pop("LD_PRELOAD", "")
    others = [path for path in preload.split(":") if path and Path(path).name != adopt_library.path().name]
    if others:
        kept["LD_PRELOAD"] = ":".join(others)
    return kept


def oom_score_adj(pid: int) -> int:
    """
    The ``oom_score_adj`` of a process (proc(5)).

    :raises OSError: it has exited.
    """
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text(encoding="ascii"))


def set_oom_score_adj(pid: int, value: int) -> None:
    """
    Change it, if it has another value.

    :raises OSError: it has exited, or that is not allowed.
    """
    if oom_score_adj(pid) != value:
        Path(f"/proc/{pid}/oom_score_adj").write_text(str(value), encoding="ascii")


def protect_from_oom(pid: int) -> None:
    """Have the OOM killer kill a process last; with CAP_SYS_RESOURCE, never."""

    for value in (-1000, 0):
        with contextlib.suppress(OSError):
            if oom_score_adj(pid) > value:
                set_oom_score_adj(pid, value)


def _specification(identity: Identity, directory: int | None, cgroups: Sequence[str]) -> dict[str, Any]:
    confinement, thread = identity.confinement, identity.scheduling
    return {
        "uids": confinement.uids,
        "gids": confinement.gids,
        "groups": confinement.groups,
        "umask": confinement.umask,
        "inheritable": confinement.inheritable,
        "bounding": confinement.bounding,
        "ambient": confinement.ambient,
        "no_new_privs": confinement.no_new_privs,
        "label": confinement.label or None,
        "limits": {number: (soft, hard) for number, soft, hard in confinement.limits},
        "core_dump_filter": confinement.core_dump_filter or None,
        "personality": confinement.personality,
        "without_huge_pages": confinement.without_huge_pages,
        "cgroups": list(cgroups),
        "oom_score_adj": FIRST_TO_DIE,
        "affinity": sorted(thread.affinity),
        "nice": thread.nice,
        "io_priority": thread.io_priority,
        "timer_slack": thread.timer_slack or None,
        "directory": directory,
    }


def _python() -> str:
    return sys.executable or shutil.which("python3") or "/usr/bin/python3"
