"""
AppArmor: add the rules that a hop needs to the files for local additions to libvirt's profiles, and remove them.

libvirt makes a profile for each domain when it starts, from an abstraction that includes
``local/abstractions/libvirt-qemu``; so the rules apply to every QEMU that is started afterwards, and so to
every destination. The daemon's own profile is replaced in the running kernel. The source's profile needs no rule: the
descriptors that it gets have no path, and AppArmor lets an unconfined root access a confined process.

The administrator's lines in these files stay as they are: ours are at the top, between two marks.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sevhop_qmp import adopt_library
from sevhop_qmp.errors import SevhopError

from ..libvirt import hook_server
from ..process import apparmor_profile
from . import atomic_file

PROFILES = apparmor_profile.PROFILES
#: The profiles that the kernel has loaded, one a line, with its mode. Without AppArmor there is no such file.
_LOADED = apparmor_profile.KERNEL / "profiles"
_RULES = Path(__file__).resolve().parent.parent / "host" / "apparmor.d"
_BEGIN = b"# sevhop: begin (from `sevhop install`; `sevhop uninstall` takes it out, and nothing else)\n"
_END = b"# sevhop: end\n"
_BLOCK = re.compile(rb"^# sevhop: begin\b[^\n]*\n.*?^# sevhop: end\n", re.MULTILINE | re.DOTALL)
_MARK = re.compile(rb"^# sevhop: (?:begin|end)\b", re.MULTILINE)
#: Characters of a quoted path that must be escaped.
_SPECIAL = re.compile(r"[\\\"*?\[\]{}^]")


@dataclass(frozen=True)
class Addition:
    """
    Rules of ours in one file for local additions.

    :ivar rules: which, a file in ``host/apparmor.d``.
    :ivar profile: what includes the file: an abstraction, or the profile of a daemon of libvirt's.
    """

    rules: str
    profile: str

    @property
    def path(self) -> Path:
        """The file for local additions."""
        return PROFILES / "local" / self.profile

    @property
    def included(self) -> bool:
        """Whether there is a profile that includes it."""
        with contextlib.suppress(OSError):
            text = (PROFILES / self.profile).read_text(errors="replace")
            return re.search(rf"include\s[^#\n]*<local/{re.escape(self.profile)}>", text) is not None
        return False

    @property
    def text(self) -> bytes:
        """The lines."""
        text = (_RULES / self.rules).read_text()
        paths = {"@LIBRARY@": adopt_library.path(), "@CLIENT@": hook_server.CLIENT, "@PYTHON@": Path(sys.executable)}
        for mark, path in paths.items():
            text = text.replace(mark, quoted(path.resolve()))
        return os.fsencode(text)

    @property
    def in_place(self) -> bool:
        """Whether the file has our lines, in their current form."""
        with contextlib.suppress(OSError):
            return self.included and _BEGIN + self.text + _END in self.path.read_bytes()
        return False


_QEMU = Addition("libvirt-qemu", "abstractions/libvirt-qemu")
_DAEMONS = tuple(Addition("libvirtd", f"usr.sbin.{name}") for name in ("libvirtd", "virtqemud"))


def active() -> bool:
    """Whether the kernel has AppArmor, with libvirt's profiles."""
    return _LOADED.exists() and _QEMU.included


def in_place() -> bool:
    """Whether a QEMU that libvirt starts from now on may take over a guest."""
    return _QEMU.in_place


def install() -> list[Path]:
    """
    Write the rules, and load those for the daemon into the kernel. Without AppArmor this does nothing.

    :return: the files that have our rules now.
    :raises SevhopError: a file cannot be written, or AppArmor does not accept the rules; then nothing has changed.
    """
    if not active():
        return []
    adopt_library.path()  # a rule for one that is missing would be of no use
    additions = [addition for addition in (_QEMU, *_DAEMONS) if addition.included]
    with _restored_on_failure([addition.path for addition in additions]):
        for addition in additions:
            _rewrite(addition.path, addition.text)
        # libvirt makes the profile of a domain from this template. An error would keep every domain from starting.
        _parse("--skip-kernel-load", "--skip-cache", PROFILES / "libvirt" / "TEMPLATE.qemu")
        _reload(additions)
    return [addition.path for addition in additions]


def uninstall() -> bool:
    """
    Remove the rules. The files stay: a profile may require them.

    :return: whether there were any.
    :raises SevhopError: a file cannot be written.
    """
    changed = []
    for addition in (_QEMU, *_DAEMONS):
        if addition.path.exists() and _rewrite(addition.path, b""):
            changed.append(addition)
    _reload(changed)
    return bool(changed)


def with_rules(contents: bytes, rules: bytes) -> bytes:
    """
    A file for local additions with our rules, or without them if ``rules`` is empty. All other bytes stay.

    :raises ValueError: one of our two marks is missing in it.
    """
    rest = _BLOCK.sub(b"", contents)
    if _MARK.search(rest):
        raise ValueError("one of the two lines that begin with '# sevhop:' is missing")
    # At the top: the administrator's last line may have no newline.
    return _BEGIN + rules + _END + rest if rules else rest


def quoted(path: Path) -> str:
    """A path as a rule needs it, with special characters escaped."""
    return '"' + _SPECIAL.sub(lambda found: f"\\{found[0]}", str(path)) + '"'


def _rewrite(path: Path, rules: bytes) -> bool:
    """:return: whether that changed the file."""
    try:
        contents = path.read_bytes() if path.exists() else b""
        wanted = with_rules(contents, rules)
        if wanted != contents:
            atomic_file.write(path.resolve(), wanted, 0o644, keep_owner=True)
    except ValueError as err:
        raise SevhopError(
            f"cannot change {path}: {err}", "repair the file, or remove both lines and what is between them"
        ) from err
    except OSError as err:
        raise SevhopError(f"cannot read {path}: {err.strerror}", "run sevhop as root") from err
    return wanted != contents


@contextlib.contextmanager
def _restored_on_failure(paths: Sequence[Path]) -> Iterator[None]:
    before = {path: path.read_bytes() if path.exists() else b"" for path in paths}
    try:
        yield
    except BaseException:
        for path, contents in before.items():
            if path.exists():
                atomic_file.write(path.resolve(), contents, 0o644, keep_owner=True)
        raise


def _reload(additions: Sequence[Addition]) -> None:
    """Replace the profiles of daemons that the kernel has loaded; those that the administrator disabled stay so."""
    loaded = {line.rpartition(" ")[0] for line in _LOADED.read_text().splitlines()} if _LOADED.exists() else set()
    for addition in additions:
        daemon = addition.profile.removeprefix("usr.sbin.")
        if not loaded.isdisjoint({daemon, f"/usr/sbin/{daemon}"}):
            _parse("--replace", "--skip-read-cache", "--write-cache", PROFILES / addition.profile)


def _parse(*arguments: str | Path) -> None:
    """:raises SevhopError: AppArmor does not accept it."""
    try:
        apparmor_profile.parse(*arguments, base=PROFILES)
    except SevhopError as err:
        raise SevhopError(err.message, err.hint or "nothing was changed") from err
