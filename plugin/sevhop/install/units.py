"""
The systemd units. Those that run ``sevhop recover``, at boot and every minute while there is the journal of an
interrupted hop, are installed and enabled. Those that upgrade outdated domains when a package has installed another
QEMU are installed only; the administrator may enable them. Nothing is done where systemd does not run, nor to units
that are part of sevhop's package.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from sevhop_qmp.errors import SevhopError

from ..process import systemd
from . import atomic_file

#: Where the administrator's units are.
DIRECTORY = Path("/etc/systemd/system")
#: Where units of packages are.
PACKAGED = Path("/usr/lib/systemd/system")
_TEMPLATES = Path(__file__).resolve().parent.parent / "host" / "systemd"
#: These are enabled.
RECOVER = ("sevhop-recover.service", "sevhop-recover.path")
#: The last of those starts this one, and this one the first.
DELAY = "sevhop-recover.timer"
#: These are not; the administrator enables the first one.
UPGRADE = ("sevhop-upgrade.path", "sevhop-upgrade.timer", "sevhop-upgrade.service")
NAMES = (*RECOVER, DELAY, *UPGRADE)


def install() -> list[Path]:
    """
    Write the units, and enable those that recover.

    :return: their files.
    :raises SevhopError: a file cannot be written, or systemctl fails.
    """
    if not systemd.manages_host() or all((PACKAGED / name).exists() for name in NAMES):
        return []
    for name in NAMES:
        atomic_file.write(DIRECTORY / name, text(name).encode(), 0o644)
    _systemctl("daemon-reload")
    _systemctl("enable", *RECOVER)
    _systemctl("start", RECOVER[-1])
    return [DIRECTORY / name for name in NAMES]


def uninstall() -> bool:
    """
    Disable the units, and remove them.

    :return: whether there were any.
    :raises SevhopError: systemctl fails.
    """
    there = [name for name in NAMES if (DIRECTORY / name).exists()]
    if not there or not systemd.manages_host():
        return False
    _systemctl("disable", "--now", *there)
    for name in there:
        (DIRECTORY / name).unlink(missing_ok=True)
    _systemctl("daemon-reload")
    return True


def text(name: str) -> str:
    """A unit, for this installation of sevhop."""
    return (_TEMPLATES / name).read_text().replace("@PYTHON@", quoted(sys.executable))


def quoted(path: str) -> str:
    """A path as an argument of a command (systemd.service(5), systemd.unit(5))."""
    special = {"\\": "\\\\", '"': '\\"', "$": "$$", "%": "%%"}
    return '"' + "".join(special.get(character, character) for character in path) + '"'


def _systemctl(*arguments: str) -> None:
    try:
        done = subprocess.run(["systemctl", *arguments], capture_output=True, text=True, check=False)
    except OSError as err:
        raise SevhopError(f"cannot run systemctl: {err.strerror}", "install the package systemd") from err
    if done.returncode:
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise SevhopError(f"cannot run systemctl {' '.join(arguments)}: {reason}", "run that command")
