"""
Whether an emulator loads adopt.so, run as the guest's user.

A QEMU with a source's command line but without the library is an ordinary QEMU: before anybody could notice, it has
taken over the source's sockets and truncated its logs. The dynamic loader ignores a library in LD_PRELOAD, with a
message at most, if the user cannot read it, if the program has file capabilities or a setuid bit, or if a security
module requires it (ld.so(8), "secure-execution mode"); a wrapper script may drop the environment. So it is probed
before: the emulator is started as the destination will be, but as a machine without devices, and queried for the
library's commands.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

from sevhop_qmp import adopt_library
from sevhop_qmp.credentials import Credentials
from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import QemuProcess

from ..process import launch
from ..process.confinement import Confinement
from ..process.launch import Identity
from ..process.scheduling import Thread
from . import emulator
from .emulator import Emulator

#: (emulator, library, user and environment) → whether the library is loaded.
_probed: dict[object, bool] = {}
#: Probes in progress: whoever wants the same one waits for it, and has its error as well.
_running: dict[object, Future[bool]] = {}
_lock = threading.Lock()
#: The emulators that run for a probe; whether there will be no other.
_children: set[subprocess.Popen[bytes]] = set()
_abandoned = False


class NotLoaded(SevhopError):
    """
    An emulator does not load the library.

    :ivar emulator: it.
    """

    def __init__(self, emulator: Emulator, uid: int) -> None:
        super().__init__(
            f"{emulator.path} does not load {adopt_library.path()} as user {uid}",
            "it must have no file capabilities and no setuid bit, and a wrapper script must keep LD_PRELOAD",
        )
        self.emulator = emulator


def verify_readable(user: Credentials) -> str:
    """
    Verify that QEMU's user can read the library.

    :return: its path.
    :raises SevhopError: that user cannot.
    """
    path = adopt_library.path()
    if user.may("r", path):
        return str(path)
    closed = next((one for one in reversed(path.parents) if not user.may("x", one)), None)
    if closed is None:
        raise SevhopError(f"the user of QEMU ({user.uid}) cannot read {path}", f"chmod o+r {path}")
    raise SevhopError(
        f"the user of QEMU ({user.uid}) cannot read {path} because of {closed}",
        f"install sevhop where all users may read it (not below /root), or: chmod o+x {closed}",
    )


def probe_for(process: QemuProcess, path: str) -> Emulator:
    """
    Query an emulator, and verify that it can replace a guest's QEMU: that one's user may run it, and it loads the
    library.

    :raises SevhopError: as :func:`probe` does, or the user may not.
    """
    emulator.trusted(path)
    user = process.credentials
    if not user.may("x", Path(path)):
        raise SevhopError(
            f"the user of the guest's QEMU ({user.uid}) may not run {path}",
            "install it for all users, or name another one with --emulator",
        )
    identity = Identity(Confinement.of(process), Thread.of(process.pid))
    return probe(path, identity, launch.inheritable(process.environment))


def probe(path: str, identity: Identity, environment: Mapping[str, str]) -> Emulator:
    """
    Query an emulator, and verify that it loads the library.

    It is started once for each user, and not again by this process unless a file has changed.

    :param environment: of the destination.
    :raises NotLoaded: it does not load the library.
    :raises SevhopError: it cannot be trusted, cannot be started, or is not QEMU.
    """
    file = emulator.trusted(path)
    library = adopt_library.path()
    # Not in the guest's cgroups, which may have no room for it; and without its label, which is for this guest alone.
    outside = identity._replace(confinement=identity.confinement._replace(label="", cgroups=()))
    environment = {**environment, **adopt_library.preloading(environment)}
    state = library.stat()
    who = identity.confinement
    rights = (who.uids, who.gids, who.groups, who.inheritable, who.bounding, who.ambient, who.no_new_privs)
    key = (file, library, state.st_ino, state.st_mtime_ns, rights, tuple(sorted(environment.items())))
    if not _once(key, lambda: _loads_library(path, file, outside, environment)):
        raise NotLoaded(emulator.probe(path), identity.confinement.uids[1])
    return emulator.probe(path)


def abandon() -> None:
    """
    Probes in progress fail at once, and so do all later ones: for a command that ends, whose hop has not begun or needs
    no probe any more.
    """
    global _abandoned
    with _lock:
        _abandoned = True
        for child in _children:
            launch.kill_session(child)


def _once(key: object, probe: Callable[[], bool]) -> bool:
    """The result of a probe, which is run by one thread; it is run again if it has failed."""
    with _lock:
        if key in _probed:
            return _probed[key]
        ours = key not in _running
        running = _running.setdefault(key, Future())
    if not ours:
        return running.result()
    try:
        running.set_result(probe())
        _probed[key] = running.result()
    except BaseException as err:
        running.set_exception(err)
        raise
    finally:
        with _lock:
            del _running[key]
    return _probed[key]


def _loads_library(path: str, file: emulator.FileIdentity, identity: Identity, environment: Mapping[str, str]) -> bool:
    last_error, answers = _query(path, identity, environment)
    try:
        _, commands = emulator.parse(path, file, answers)
    except SevhopError as err:
        raise SevhopError(f"{err.message}: {last_error}" if last_error else err.message, err.hint) from err
    return set(adopt_library.COMMANDS) <= commands


def _query(path: str, identity: Identity, environment: Mapping[str, str]) -> tuple[str, bytes]:
    """The last line of its standard error, and its answers."""
    directory = os.open("/", os.O_PATH | os.O_CLOEXEC)
    started: list[subprocess.Popen[bytes]] = []

    def start(command: Sequence[str], stdin: int, stdout: int, stderr: int) -> subprocess.Popen[bytes]:
        child = launch.spawn(
            command,
            environment,
            identity,
            directory=directory,
            ends_with_us=True,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
        )
        started.append(child)
        with _lock:
            _children.add(child)
            if _abandoned:
                launch.kill_session(child)
        return child

    try:
        answers, errors = emulator.query(path, emulator.COMMANDS, start)
    finally:
        with _lock:
            _children.difference_update(started)
        os.close(directory)
    lines = errors.decode(errors="replace").strip().splitlines()
    last = lines[-1] if lines else ""
    if last.startswith(launch.CANNOT_APPLY):
        raise SevhopError(
            f"cannot start {path}: {last.removeprefix('sevhop: ')}",
            "run sevhop as root, with limits (ulimit) that are not below the old QEMU's",
        )
    return last, answers
