"""
AppArmor: a copy of a domain's profile, for a QEMU beside libvirt.

libvirt makes a profile for each domain, ``libvirt-UUID``, and unloads it when it shuts the domain off. The kernel then
takes every process that it still confines for unconfined. So a transit has a copy, under a name of its own. What is
copied is libvirt's file of that profile, with all that it includes. Rules that were added since the start, such as
those of ``sevhop install``, are in it, as they will be in libvirt's next one.

The name begins like libvirt's and has hexadecimal digits behind that: aa-remove-unknown(8) leaves such profiles alone,
and rules of other profiles for ``libvirt-*`` apply to it. A rule that names the domain's own profile means that
one in the copy as well, and ``@{profile_name}`` means the copy.

For the same reason a copy is unloaded only when no process is confined by it any more.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import subprocess
import time
from pathlib import Path
from typing import NamedTuple, Self

from sevhop_qmp import selinux
from sevhop_qmp.errors import SevhopError

PROFILES = Path("/etc/apparmor.d")
#: The kernel's interface. Without AppArmor there is no such directory.
KERNEL = Path("/sys/kernel/security/apparmor")
#: A label as /proc shows it.
_LABEL = re.compile(r"(?P<profile>.+) \((?P<mode>[a-z]+)\)")
#: Labels that confine nothing.
UNCONFINED = ("", "unconfined")
_OF_A_DOMAIN = re.compile(r"libvirt-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
#: Modes in which a profile can be loaded, and what the parser needs for that.
_MODES = {"enforce": (), "complain": ("--Complain",)}
_PROC = Path("/proc")
#: Seconds for the parser.
_TIMEOUT = 120.0
#: Seconds for the last process to exit, and between two looks.
_UNUSED_TIMEOUT = 2.0
_POLL = 0.01


class Label(NamedTuple):
    """
    The profile that confines a process.

    :ivar profile: its name; libvirt's are named ``libvirt-UUID``.
    :ivar mode: ``enforce``, or ``complain`` which denies nothing.
    """

    profile: str
    mode: str

    def __str__(self) -> str:
        return f"{self.profile} ({self.mode})"


def label(confinement: str) -> Label | None:
    """A label as /proc shows it; None when it is not one of AppArmor's."""
    found = _LABEL.fullmatch(confinement)
    return Label(found["profile"], found["mode"]) if found else None


class ProfileCopy(NamedTuple):
    """
    A copy of a domain's profile. :meth:`load` it before its QEMU is started, :meth:`remove` it when that has exited.

    :ivar original: what confines the domain's QEMU.
    :ivar label: what confines a QEMU that was started with the copy.
    """

    original: Label
    label: Label

    @classmethod
    def of(cls, confinement: str) -> Self | None:
        """
        Decide what it is to be. Nothing is touched.

        :param confinement: label of the domain's QEMU.
        :return: None if nothing confines it, or SELinux, which takes nothing back: a transit has the same label.
        :raises SevhopError: it is not confined by a profile that libvirt has made, and that alone.
        """
        if confinement in UNCONFINED or selinux.is_context(confinement):
            return None
        original = label(confinement)
        if original is None or original.mode not in _MODES or not _OF_A_DOMAIN.fullmatch(original.profile):
            raise SevhopError(f"its QEMU is confined ({confinement}), which libvirt takes back when it exits")
        return cls(original, Label(f"{original.profile}-{secrets.token_hex(4)}", original.mode))

    def load(self) -> None:
        """
        Load it into the kernel, in the mode of the original. Copies of the same profile that confine nothing, which a
        command that was killed has left, are removed.

        :raises SevhopError: it cannot be read, or AppArmor does not accept it; then it is not loaded.
        """
        for name in _loaded():
            if name.startswith(f"{self.original.profile}-") and not _confines(name):
                _unload(name)
        path = PROFILES / "libvirt" / self.original.profile
        try:
            text = renamed(path.read_bytes(), self.original.profile, self.label.profile)
        except OSError as err:
            raise SevhopError(f"cannot read {path}: {err.strerror}") from err
        except ValueError as err:
            raise SevhopError(f"cannot copy {path}: {err}") from err
        try:
            parse("--add", "--skip-cache", *_MODES[self.label.mode], text=text, base=PROFILES)
            mode = _loaded().get(self.label.profile)
            if mode != self.label.mode:
                raise SevhopError(f"AppArmor has loaded a copy of {path} as {mode}, and not as {self.label.mode}")
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Unload it, unless a process is confined by it. May be repeated."""
        remove(self.label.profile)


def remove(name: str) -> None:
    """The same by its name, after a crash; nothing if that is empty."""
    deadline = time.monotonic() + _UNUSED_TIMEOUT
    while name and name in _loaded():
        if not _confines(name):
            _unload(name)
            return
        if time.monotonic() > deadline:
            return
        time.sleep(_POLL)


def renamed(text: bytes, original: str, name: str) -> bytes:
    """
    A file of libvirt's with one profile, which has another name then.

    :raises ValueError: it has not exactly one profile of that name.
    """
    head = re.compile(rb"^(profile\s+)" + re.escape(original.encode()) + rb"(?=[\s{])", re.MULTILINE)
    result, count = head.subn(lambda found: found[1] + name.encode(), text)
    if count != 1:
        raise ValueError(f"it has {count} profiles named {original}")
    return result


def parse(*arguments: str | Path, base: Path, text: bytes | None = None) -> None:
    """
    Run apparmor_parser(8).

    :param base: directory that includes are relative to.
    :param text: its standard input, which it reads if ``arguments`` name no file.
    :raises SevhopError: it does not accept that, or cannot be run.
    """
    program = shutil.which("apparmor_parser") or "/usr/sbin/apparmor_parser"
    command = [program, "--base", base, *arguments]
    try:
        done = subprocess.run(command, input=text or b"", capture_output=True, timeout=_TIMEOUT, check=False)
    except OSError as err:
        raise SevhopError(f"cannot run {program}: {err.strerror}", "install the package apparmor") from err
    except subprocess.TimeoutExpired as err:
        raise SevhopError(f"{program} was killed: it took longer than {_TIMEOUT:g} s") from err
    if done.returncode:
        reason = (done.stderr.decode(errors="replace").strip() or "no reason was given").splitlines()[-1]
        raise SevhopError(f"AppArmor does not accept {arguments[-1] if text is None else 'a copy'}: {reason}")


def _loaded() -> dict[str, str]:
    """Name and mode of each profile that the kernel has loaded."""
    with contextlib.suppress(OSError):
        rows = (KERNEL / "profiles").read_text(errors="replace").splitlines()
        return {found.profile: found.mode for row in rows if (found := label(row)) is not None}
    return {}


def _confines(name: str) -> bool:
    """Whether there is a process that a profile confines, perhaps together with others."""
    for process in _PROC.iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit() and name in (process / "attr/current").read_text(errors="replace"):
                os.readlink(process / "exe")  # one that has exited, and was not waited for, has none
                return True
    return False


def _unload(name: str) -> None:
    with contextlib.suppress(OSError):
        (KERNEL / ".remove").write_text(name)
