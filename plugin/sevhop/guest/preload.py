"""
Whether adopt.so gets into a QEMU: as that user, into that emulator.

A QEMU with a source's command line but without the library is an ordinary QEMU: before anybody could notice, it has
taken the source's sockets and emptied its logs. The dynamic loader leaves a library out, and says so at most, if the
user cannot read it, if the program has file capabilities or a setuid bit, or if a security module asks for it
(ld.so(8), "secure-execution mode"); a script in front of the emulator may take the environment away. So it is tried
before: the emulator is started as the destination will be, but as a machine without parts, and asked for the library's
commands.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import replace

from sevhop_qmp import adopt
from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import Credentials

from ..process import launch
from ..process.launch import Identity
from . import emulator
from .emulator import Emulator

#: (emulator, library, who) → whether the library is in there.
_tried: dict[object, bool] = {}


class NotLoaded(SevhopError):
    """
    The library does not get into an emulator.

    :ivar emulator: what it is.
    """

    def __init__(self, emulator: Emulator, uid: int) -> None:
        super().__init__(
            f"{emulator.path} does not load {adopt.library_path()} as user {uid}",
            "it must have no file capabilities and no setuid bit, and a script in front of it must keep LD_PRELOAD",
        )
        self.emulator = emulator


def see_readable(user: Credentials) -> str:
    """
    See that QEMU's user can read the library.

    :return: its path.
    :raises SevhopError: that user cannot.
    """
    path = adopt.library_path()
    if user.may("r", path):
        return str(path)
    closed = next((one for one in reversed(path.parents) if not user.may("x", one)), None)
    if closed is None:
        raise SevhopError(f"the user of QEMU ({user.uid}) cannot read {path}", f"chmod o+r {path}")
    raise SevhopError(
        f"the user of QEMU ({user.uid}) cannot read {path} because of {closed}",
        f"install sevhop where all users may read it (not below /root), or: chmod o+x {closed}",
    )


def look(path: str, identity: Identity, environment: Mapping[str, str]) -> Emulator:
    """
    Find out what an emulator is, and see that the library gets into it.

    It is started once for each user, and not again in this process unless a file has changed.

    :param environment: of the destination.
    :raises NotLoaded: it does not load the library.
    :raises SevhopError: it cannot be trusted, cannot be started, or is not QEMU.
    """
    file = emulator.trusted(path)
    library = adopt.library_path()
    # Elsewhere than the guest, whose cgroups may have no room for it; and not under a label that is this guest's alone.
    somewhere = replace(identity, confinement=replace(identity.confinement, label="", cgroups=()))
    environment = {**environment, **adopt.library_environment(environment)}
    state = library.stat()
    who = identity.confinement
    rights = (who.uids, who.gids, who.groups, who.inheritable, who.bounding, who.ambient, who.no_new_privs)
    key = (file, library, state.st_ino, state.st_mtime_ns, rights, tuple(sorted(environment.items())))
    if key not in _tried:
        words, answers = _ask(path, somewhere, environment)
        try:
            _, commands = emulator.understand(path, file, answers)
        except SevhopError as err:
            raise SevhopError(f"{err.message}: {words}" if words else err.message, err.hint) from err
        _tried[key] = set(adopt.COMMANDS) <= commands
    if not _tried[key]:
        raise NotLoaded(emulator.look(path), identity.confinement.uids[1])
    return emulator.look(path)


def _ask(path: str, identity: Identity, environment: Mapping[str, str]) -> tuple[str, bytes]:
    """The last line that it says, and its answers."""
    try:
        directory = os.open("/", os.O_PATH | os.O_CLOEXEC)
        try:
            child = launch.spawn(
                [path, *emulator.PROBE],
                environment,
                identity,
                directory=directory,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        finally:
            os.close(directory)
        with child:
            try:
                answers, messages = child.communicate(emulator.QUESTIONS, timeout=emulator.PATIENCE)
            finally:
                child.kill()
    except (OSError, subprocess.SubprocessError) as err:
        raise emulator.silent(path, err) from err
    lines = messages.decode(errors="replace").strip().splitlines()
    return (lines[-1].removeprefix("sevhop: ") if lines else ""), answers
