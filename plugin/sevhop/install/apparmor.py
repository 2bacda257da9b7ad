"""
AppArmor: the rules that a hop needs under libvirt's profiles, put into the files for local additions, and taken out.

libvirt makes a profile for each domain when it starts, from an abstraction that includes
``local/abstractions/libvirt-qemu``; so the rules hold for every QEMU that is started afterwards, and every destination
is. The daemon's own profile is replaced in the running kernel. What runs in the source's profile needs no rule: the
descriptors that it is given have no path, and AppArmor does not keep an unconfined root out of a confined process.

The administrator's lines in these files stay as they are: ours stand at their top, between two marks.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sevhop_qmp import adopt
from sevhop_qmp.errors import SevhopError

from ..libvirt import hook_server

PROFILES = Path("/etc/apparmor.d")
#: The profiles that the kernel has loaded, each line a name and a mode. It is not there without AppArmor.
_LOADED = Path("/sys/kernel/security/apparmor/profiles")
_RULES = Path(__file__).resolve().parent.parent / "host" / "apparmor.d"
_BEGIN = b"# sevhop: begin (from `sevhop install`; `sevhop uninstall` takes it out, and nothing else)\n"
_END = b"# sevhop: end\n"
_BLOCK = re.compile(rb"^# sevhop: begin\b[^\n]*\n.*?^# sevhop: end\n", re.MULTILINE | re.DOTALL)
_MARK = re.compile(rb"^# sevhop: (?:begin|end)\b", re.MULTILINE)
#: A label as /proc shows it.
_LABEL = re.compile(r"(?P<profile>.+) \((?P<mode>[a-z]+)\)")
#: What stands for something else than itself in a quoted path.
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
        paths = {"@LIBRARY@": adopt.library_path(), "@CLIENT@": hook_server.CLIENT, "@PYTHON@": Path(sys.executable)}
        for mark, path in paths.items():
            text = text.replace(mark, quoted(path.resolve()))
        return os.fsencode(text)

    @property
    def in_place(self) -> bool:
        """Whether our lines are in the file, as they should be today."""
        with contextlib.suppress(OSError):
            return self.included and _BEGIN + self.text + _END in self.path.read_bytes()
        return False


_QEMU = Addition("libvirt-qemu", "abstractions/libvirt-qemu")
_DAEMONS = tuple(Addition("libvirtd", f"usr.sbin.{name}") for name in ("libvirtd", "virtqemud"))


@dataclass(frozen=True)
class Label:
    """
    What a process is confined by.

    :ivar profile: its name; libvirt's are named ``libvirt-UUID``.
    :ivar mode: ``enforce``, or ``complain`` which forbids nothing.
    """

    profile: str
    mode: str


def label(confinement: str) -> Label | None:
    """A label as /proc shows it; None when it is not one of AppArmor's."""
    found = _LABEL.fullmatch(confinement)
    return Label(found["profile"], found["mode"]) if found else None


def active() -> bool:
    """Whether the kernel has AppArmor, with libvirt's profiles."""
    return _LOADED.exists() and _QEMU.included


def in_place() -> bool:
    """Whether a QEMU that libvirt starts now may take over a guest."""
    return _QEMU.in_place


def install() -> list[Path]:
    """
    Put the rules in place and have the kernel take over those for the daemon. Nothing happens without AppArmor.

    :return: the files that have our rules now.
    :raises SevhopError: a file cannot be written, or AppArmor does not accept the rules; then all is as before.
    """
    if not active():
        return []
    try:
        adopt.library_path()
    except FileNotFoundError as err:
        raise SevhopError(str(err)) from err
    additions = [addition for addition in (_QEMU, *_DAEMONS) if addition.included]
    with _restored_on_failure([addition.path for addition in additions]):
        for addition in additions:
            _rewrite(addition.path, addition.text)
        # From this libvirt makes the profile of a domain. A mistake would keep every domain from starting.
        _parse("--skip-kernel-load", "--skip-cache", PROFILES / "libvirt" / "TEMPLATE.qemu")
        _reload(additions)
    return [addition.path for addition in additions]


def uninstall() -> bool:
    """
    Take the rules out again. The files stay: a profile may not do without.

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
    A file for local additions with our rules, or without any if they are empty. All other bytes stay.

    :raises ValueError: one of our two marks is missing in it.
    """
    rest = _BLOCK.sub(b"", contents)
    if _MARK.search(rest):
        raise ValueError("one of the two lines that begin with '# sevhop:' is missing")
    # At the top: then it does not matter whether the last line of the others is complete.
    return _BEGIN + rules + _END + rest if rules else rest


def quoted(path: Path) -> str:
    """A path as a rule names it, whatever characters are in it."""
    return '"' + _SPECIAL.sub(lambda found: f"\\{found[0]}", str(path)) + '"'


def _rewrite(path: Path, rules: bytes) -> bool:
    """:return: whether that changed the file."""
    try:
        contents = path.read_bytes() if path.exists() else b""
        wanted = with_rules(contents, rules)
        if wanted != contents:
            _replace(path, wanted)
    except ValueError as err:
        raise SevhopError(f"{path}: {err}", "repair the file, or remove both lines and what is between them") from err
    except OSError as err:
        raise SevhopError(f"{path} cannot be written: {err.strerror}", "run sevhop as root") from err
    return wanted != contents


def _replace(path: Path, contents: bytes) -> None:
    """The file as a whole, or not at all; the new one has the mode and owner of the old one."""
    path = path.resolve()
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".sevhop-", delete=False) as file:
        try:
            file.write(contents)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            with contextlib.suppress(FileNotFoundError):
                old = path.stat()
                os.fchown(file.fileno(), old.st_uid, old.st_gid)
                os.fchmod(file.fileno(), stat.S_IMODE(old.st_mode))
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


@contextlib.contextmanager
def _restored_on_failure(paths: Sequence[Path]) -> Iterator[None]:
    before = {path: path.read_bytes() if path.exists() else b"" for path in paths}
    try:
        yield
    except BaseException:
        for path, contents in before.items():
            if path.exists():
                _replace(path, contents)
        raise


def _reload(additions: Sequence[Addition]) -> None:
    """Those profiles of daemons that the kernel has loaded; what the administrator has disabled stays so."""
    loaded = {line.rpartition(" ")[0] for line in _LOADED.read_text().splitlines()} if _LOADED.exists() else set()
    for addition in additions:
        daemon = addition.profile.removeprefix("usr.sbin.")
        if not loaded.isdisjoint({daemon, f"/usr/sbin/{daemon}"}):
            _parse("--replace", "--skip-read-cache", "--write-cache", PROFILES / addition.profile)


def _parse(*arguments: str | Path) -> None:
    """:raises SevhopError: AppArmor does not take that."""
    program = shutil.which("apparmor_parser") or "/usr/sbin/apparmor_parser"
    command = [program, "--base", PROFILES, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as err:
        raise SevhopError(f"{program}: {err.strerror}", "install the package apparmor") from err
    if done.returncode:
        reason = (done.stderr.strip() or "no reason was given").splitlines()[-1]
        raise SevhopError(f"AppArmor does not accept {arguments[-1]}: {reason}", "nothing was changed")
