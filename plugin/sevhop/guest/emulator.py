"""
A QEMU binary that a guest may go to: which version it is, which machine types it has, and whether it can be trusted.

It gets the guest's memory and the right to run it. So nobody but root may be able to exchange it: neither the file, nor
a directory on the way to it, nor a link that is followed.
"""

from __future__ import annotations

import grp
import json
import os
import pwd
import stat
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sevhop_qmp.errors import SevhopError

#: Seconds in which a QEMU must have told what it is.
PATIENCE = 60.0
HINT = "name a QEMU system emulator with --emulator"
#: A machine without parts, which needs neither a guest nor rights.
PROBE = ("-machine", "none,accel=tcg:kvm", "-nodefaults", "-no-user-config", "-display", "none", "-S", "-qmp", "stdio")
QUESTIONS = (
    b'{"execute": "qmp_capabilities"} {"execute": "query-machines"} {"execute": "query-commands"} {"execute": "quit"}'
)
#: The first version that refuses to read a stream from a regular file by descriptor, which is what libvirt gives it.
_NO_STREAM_FROM_FILE = (11, 0, 0)
#: As many symbolic links are followed as the kernel follows.
_LINKS = 40
#: A path, and what stat(2) says that is there.
FileIdentity = tuple[str, int, int, int, int]


@dataclass(frozen=True)
class Emulator:
    """
    A QEMU binary.

    :ivar path: as it was named.
    :ivar version: such as ``10.0.2``.
    :ivar machine_types: their names and aliases.
    """

    path: str
    version: str
    machine_types: frozenset[str]

    @property
    def wants_pipe(self) -> bool:
        """Whether it loads a stream from a pipe, but not from a file that libvirt has opened."""
        return tuple(map(int, self.version.split("."))) >= _NO_STREAM_FROM_FILE


#: What was found out in this process.
_known: dict[FileIdentity, Emulator] = {}


def look(path: str) -> Emulator:
    """
    Find out what a binary is. It is started once, and not again in this process unless the file has changed.

    :raises SevhopError: it cannot be trusted, cannot be started, or is not QEMU.
    """
    identity = trusted(path)
    if identity in _known:
        return _known[identity]
    return understand(path, identity, _asked(path, QUESTIONS))[0]


def properties(path: str, drivers: Iterable[str]) -> dict[str, frozenset[str]]:
    """
    Find out which properties devices have in an emulator.

    :return: by driver; those that it does not have are left out.
    :raises SevhopError: as :func:`look` does.
    """
    trusted(path)
    wanted = sorted(drivers)
    questions = [{"execute": "device-list-properties", "arguments": {"typename": driver}} for driver in wanted]
    words = [{"execute": "qmp_capabilities"}, *questions, {"execute": "quit"}]
    try:
        answers = [json.loads(line) for line in _asked(path, " ".join(map(json.dumps, words)).encode()).splitlines()]
    except ValueError as err:
        raise SevhopError(f"{path} does not speak QMP", HINT) from err
    # The greeting and the answer to the first word come before these.
    answers = [answer for answer in answers if "return" in answer or "error" in answer][1 : len(wanted) + 1]
    return {
        driver: frozenset(str(row["name"]) for row in answer["return"])
        for driver, answer in zip(wanted, answers, strict=False)
        if "return" in answer
    }


def _asked(path: str, questions: bytes) -> bytes:
    """:return: what it answers, a line for each; a greeting is in front."""
    try:
        done = subprocess.run([path, *PROBE], input=questions, capture_output=True, timeout=PATIENCE, check=False)
    except (OSError, subprocess.SubprocessError) as err:
        raise silent(path, err) from err
    return done.stdout


def silent(path: str, failure: OSError | subprocess.SubprocessError) -> SevhopError:
    """What is said of a binary that could not be asked."""
    if isinstance(failure, subprocess.TimeoutExpired):
        return SevhopError(f"{path}: it has not told what it is within {PATIENCE:g} s", HINT)
    return SevhopError(f"{path}: {getattr(failure, 'strerror', None) or failure}", HINT)


def trusted(path: str) -> FileIdentity:
    """
    See that only root can exchange a binary.

    :return: what tells it from another one that may be there later.
    :raises SevhopError: somebody else can, or there is none.
    """
    if not os.path.isabs(path):
        raise SevhopError(f"{path} is not a whole path", HINT)
    try:
        if reason := distrust(path):
            raise SevhopError(
                f"{path} cannot be trusted with a guest: {reason}",
                "let only root change it and the directories above it, or name another one with --emulator",
            )
        file = os.stat(path)
    except OSError as err:
        raise SevhopError(f"{path}: {err.strerror}", HINT) from err
    return path, file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns


def understand(path: str, identity: FileIdentity, answers: bytes) -> tuple[Emulator, frozenset[str]]:
    """
    What a QEMU says that was started with :data:`PROBE` and asked :data:`QUESTIONS`.

    :return: and the names of its commands.
    :raises SevhopError: this is not QEMU.
    """
    try:
        greeting, _, machines, commands = [*_answers(answers), {"return": []}][:4]
        qemu = greeting["QMP"]["version"]["qemu"]
        version = f"{qemu['major']:d}.{qemu['minor']:d}.{qemu['micro']:d}"
        types = {str(one[key]) for one in machines["return"] for key in ("name", "alias") if key in one}
        names = frozenset(str(one["name"]) for one in commands.get("return") or () if "name" in one)
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise SevhopError(f"{path} is not a QEMU system emulator", HINT) from err
    _known[identity] = Emulator(path, version, frozenset(types))
    return _known[identity], names


def _answers(text: bytes) -> Iterator[dict[str, Any]]:
    """What a monitor says, without the events."""
    for line in text.splitlines():
        answer = json.loads(line)
        if "event" not in answer:
            yield answer


def distrust(path: str) -> str:
    """
    Who besides root could exchange a file, by a write to it or to something on the way; empty when nobody could.

    :raises OSError: there is no such file.
    """
    here, steps, links = Path("/"), _steps(path), 0
    while steps:
        directory = here.lstat()
        # In a sticky directory such as /tmp others may add, but neither rename nor remove.
        if not directory.st_mode & stat.S_ISVTX and (who := _others_who_write(directory)):
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
    who = _others_who_write(here.lstat())
    return f"{who} may write to {here}" if who else ""


def _steps(path: str) -> list[str]:
    return [part for part in reversed(Path(path).parts) if part != "/"]


def _trusted() -> set[int]:
    """Root, who we are, and who has become root by sudo to call us: that user could do anything as well."""
    uids = {0, os.geteuid()}
    if os.geteuid() == 0 and (caller := os.environ.get("SUDO_UID", "")).isdigit():
        uids.add(int(caller))
    return uids


def _others_who_write(file: os.stat_result) -> str:
    if file.st_mode & stat.S_IWOTH:
        return "everybody"
    if file.st_mode & stat.S_IWGRP and not _is_private(file.st_gid, file.st_uid):
        try:
            return f"group {grp.getgrgid(file.st_gid).gr_name}"
        except KeyError:
            return f"group {file.st_gid}"
    return ""


def _is_private(gid: int, uid: int) -> bool:
    """Whether a group is a user's own, with nobody else in it. Where users have such, their umask is 002."""
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
