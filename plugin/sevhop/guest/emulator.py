"""
A QEMU binary for the destination: its version and machine types, and whether it can be trusted.

It gets the guest's memory. So nobody but root may be able to replace it: neither the file, nor a directory in its path,
nor a symbolic link that is followed.
"""

from __future__ import annotations

import grp
import json
import os
import pwd
import stat
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sevhop_qmp.errors import SevhopError

from ..process import dialogue, launch

#: Seconds within which a QEMU must have answered.
PATIENCE = 60.0
HINT = "name a QEMU system emulator with --emulator"
#: A machine without devices, which needs neither a guest nor privileges.
PROBE = ("-machine", "none,accel=tcg:kvm", "-nodefaults", "-no-user-config", "-display", "none", "-S", "-qmp", "stdio")
COMMANDS = (
    b'{"execute": "qmp_capabilities"} {"execute": "query-machines"} {"execute": "query-commands"} {"execute": "quit"}'
)
#: The first version that refuses to read a stream from a descriptor of a regular file, which is what libvirt passes.
_NO_STREAM_FROM_FILE = (11, 0, 0)
#: The first version whose streams number the user networks (``register_savevm_live``, net/slirp.c).
_NUMBERED_USER_NETWORKS = (8, 2, 0)
#: As many symbolic links as the kernel follows.
_LINKS = 40
#: A path, and device, inode, size and modification time of the file.
FileIdentity = tuple[str, int, int, int, int]
#: Starts a process, with the arguments of :class:`subprocess.Popen`.
Start = Callable[..., subprocess.Popen[bytes]]


class Emulator(NamedTuple):
    """
    A QEMU binary.

    :ivar path: as given by the user.
    :ivar version: such as ``10.0.2``.
    :ivar machine_types: their names and aliases.
    """

    path: str
    version: str
    machine_types: frozenset[str]

    @property
    def needs_pipe(self) -> bool:
        """Whether it loads a stream from a pipe only, not from a file that libvirt has opened."""
        return _numbers(self.version) >= _NO_STREAM_FROM_FILE


def numbers_user_networks(version: str) -> bool:
    """Whether the state of several user networks (``-netdev user``) is kept apart in a QEMU's streams."""
    return _numbers(version) >= _NUMBERED_USER_NETWORKS


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


#: Binaries that this process has probed.
_known: dict[FileIdentity, Emulator] = {}


def probe(path: str) -> Emulator:
    """
    Query a binary. It is started once, and not again by this process unless the file has changed.

    :raises SevhopError: it cannot be trusted, cannot be started, or is not QEMU.
    """
    identity = trusted(path)
    if identity in _known:
        return _known[identity]
    return parse(path, identity, query(path, COMMANDS)[0])[0]


def properties(path: str, drivers: Iterable[str]) -> dict[str, frozenset[str]]:
    """
    Query which properties devices have in an emulator.

    :return: driver → names of its properties; without drivers that it does not have.
    :raises SevhopError: as :func:`probe` does.
    """
    trusted(path)
    wanted = sorted(drivers)
    queries = [{"execute": "device-list-properties", "arguments": {"typename": driver}} for driver in wanted]
    commands = [{"execute": "qmp_capabilities"}, *queries, {"execute": "quit"}]
    try:
        output = query(path, " ".join(map(json.dumps, commands)).encode())[0]
        answers = [json.loads(line) for line in output.splitlines()]
    except ValueError as err:
        raise SevhopError(f"{path} does not speak QMP", HINT) from err
    # The greeting and the answer to qmp_capabilities come before these.
    answers = [answer for answer in answers if "return" in answer or "error" in answer][1 : len(wanted) + 1]
    return {
        driver: frozenset(str(row["name"]) for row in answer["return"])
        for driver, answer in zip(wanted, answers, strict=False)
        if "return" in answer
    }


def _in_own_session(command: Sequence[str], **standard_files: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, start_new_session=True, **standard_files)


def query(path: str, commands: bytes, start: Start = _in_own_session) -> tuple[bytes, bytes]:
    """
    Start a binary with :data:`PROBE`, and have it execute QMP commands.

    :param start: starts it, in a session of its own.
    :return: the greeting and the answers, a line for each; and its standard error.
    :raises SevhopError: it cannot be started, or does not exit.
    """
    pipe = subprocess.PIPE
    try:
        with (
            dialogue.questions(commands) as stdin,
            start([path, *PROBE], stdin=stdin, stdout=pipe, stderr=pipe) as child,
        ):
            try:
                return dialogue.answers(child, PATIENCE)
            finally:
                launch.kill_session(child)
    except subprocess.TimeoutExpired as err:
        raise SevhopError(f"cannot query {path}: no answer within {PATIENCE:g} s", HINT) from err
    except dialogue.TooMuchOutput as err:
        raise SevhopError(f"{path} is not a QEMU system emulator: {err}", HINT) from err
    except (OSError, subprocess.SubprocessError) as err:
        raise SevhopError(f"cannot start {path}: {getattr(err, 'strerror', None) or err}", HINT) from err


def trusted(path: str) -> FileIdentity:
    """
    Verify that only root can replace a binary.

    :return: the identity of the file.
    :raises SevhopError: another user can, or there is none.
    """
    if not os.path.isabs(path):
        raise SevhopError(f"{path} is not an absolute path", HINT)
    try:
        if reason := untrusted_writer(path):
            raise SevhopError(
                f"{path} cannot be trusted with a guest: {reason}",
                "make it and its directories writable for root only, or name another one with --emulator",
            )
        file = os.stat(path)
    except OSError as err:
        raise SevhopError(f"{path}: {err.strerror}", HINT) from err
    return path, file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns


def parse(path: str, identity: FileIdentity, answers: bytes) -> tuple[Emulator, frozenset[str]]:
    """
    Parse the answers of a QEMU that was started with :data:`PROBE` to :data:`COMMANDS`.

    :return: the emulator, and the names of its QMP commands.
    :raises SevhopError: this is not QEMU.
    """
    try:
        greeting, _, machines, commands = [*_answers(answers), {"return": []}][:4]
        qemu = greeting["QMP"]["version"]["qemu"]
        version = f"{qemu['major']:d}.{qemu['minor']:d}.{qemu['micro']:d}"
        types = {str(one[key]) for one in machines["return"] for key in ("name", "alias") if key in one}
        names = frozenset(str(one["name"]) for one in commands.get("return") or () if "name" in one)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise SevhopError(f"{path} is not a QEMU system emulator", HINT) from err
    _known[identity] = Emulator(path, version, frozenset(types))
    return _known[identity], names


def _answers(text: bytes) -> Iterator[dict[str, Any]]:
    """The messages of a monitor, without events."""
    for line in text.splitlines():
        answer = json.loads(line)
        if "event" not in answer:
            yield answer


def untrusted_writer(path: str) -> str:
    """
    Who besides root could replace a file, by writing to it or to something in its path; empty when nobody could.

    :raises OSError: there is no such file.
    """
    here, steps, links = Path("/"), _steps(path), 0
    while steps:
        directory = here.lstat()
        # In a sticky directory such as /tmp other users may create entries, but not rename or remove those of root.
        if not directory.st_mode & stat.S_ISVTX and (who := _other_writers(directory)):
            return f"{who} may write to {here}"
        entry = Path(os.path.normpath(here / steps.pop()))
        found = entry.lstat()
        if found.st_uid not in _trusted():
            return f"{entry} belongs to {_user(found.st_uid)}"
        if stat.S_ISLNK(found.st_mode):
            links += 1
            if links > _LINKS:
                raise OSError(0, "too many symbolic links", path)
            target = os.readlink(entry)
            steps += _steps(target)
            here = Path("/") if os.path.isabs(target) else here
        else:
            here = entry
    who = _other_writers(here.lstat())
    return f"{who} may write to {here}" if who else ""


def other_owner(file: os.stat_result) -> str:
    """Who besides root may have written a file that may have no path any more; empty when nobody could."""
    if file.st_uid not in _trusted():
        return f"its file belongs to {_user(file.st_uid)}"
    who = _other_writers(file)
    return f"{who} may write to its file" if who else ""


def _steps(path: str) -> list[str]:
    return [part for part in reversed(Path(path).parts) if part != "/"]


def _trusted() -> set[int]:
    """Root, our own user, and the user who called us by sudo, who can become root anyway."""
    uids = {0, os.geteuid()}
    if os.geteuid() == 0 and (caller := os.environ.get("SUDO_UID", "")).isdigit():
        uids.add(int(caller))
    return uids


def _other_writers(file: os.stat_result) -> str:
    if file.st_mode & stat.S_IWOTH:
        return "everybody"
    if file.st_mode & stat.S_IWGRP and not _is_private(file.st_gid, file.st_uid):
        try:
            return f"group {grp.getgrgid(file.st_gid).gr_name}"
        except KeyError:
            return f"group {file.st_gid}"
    return ""


def _is_private(gid: int, uid: int) -> bool:
    """Whether a group is a user private group, with no other member. Where users have such, their umask is 002."""
    try:
        user, group = pwd.getpwuid(uid), grp.getgrgid(gid)
    except KeyError:
        return False
    return user.pw_gid == gid and set(group.gr_mem) <= {user.pw_name}


def _user(uid: int) -> str:
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"
