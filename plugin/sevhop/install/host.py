"""
What sevhop puts on a host: one script that libvirt runs; rules, where there is AppArmor; units, where there is systemd.
Installs and removes them.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
from pathlib import Path

from sevhop_qmp.errors import SevhopError

from ..libvirt import hook, hook_server
from ..records import journal, reboot_mark
from ..records.run_directory import DOMAINS, entries
from . import apparmor, atomic_file, selinux, units, verification
from .verification import HOOKS, SCRIPT

_HERE = Path(__file__).resolve().parent.parent


def install() -> list[Path]:
    """
    Write the script, the rules and the units, load the policy module, and have the daemon look for the script.

    :return: the files that are sevhop's or have lines of it.
    :raises SevhopError: one of them cannot be written, or is not accepted; or libvirt may not run the script.
    """
    daemons = verification.daemons().values()
    rules = selinux.install(SCRIPT, daemons) + apparmor.install()
    selinux.verify_hook(HOOKS, daemons)
    text = hook_script()
    # Not in the script's own directory: libvirt runs whatever is there. With its label, if it needs one: libvirt waits
    # for it whenever a domain is started.
    atomic_file.write(SCRIPT, text.encode(), 0o755, beside=HOOKS, prepare=selinux.label_hook)
    _reload_daemon()
    return [SCRIPT, *rules, *units.install()]


def hook_script(python: str = sys.executable) -> str:
    """The script, with the paths of the programs that it runs."""
    text = (_HERE / "host" / "qemu.d" / "sevhop").read_text()
    programs = {"@PYTHON@": python, "@HOOK@": hook.__file__, "@CLIENT@": str(hook_server.CLIENT)}
    for mark, path in programs.items():
        text = text.replace(mark, shlex.quote(path))
    return text


def uninstall() -> bool:
    """
    Remove the script, the rules and the units, and the script's directory if it is empty then.

    :return: whether there were any.
    :raises SevhopError: a hop is in progress or was interrupted, or a file cannot be removed.
    """
    if in_progress := entries(DOMAINS):
        raise SevhopError(f"cannot uninstall: hops are in progress: {', '.join(in_progress)}", "see sevhop status")
    # Those of guests outside libvirt, and interrupted ones.
    for path in journal.journals():
        raise SevhopError(
            f"cannot uninstall: a hop is in progress or was interrupted: {path}",
            "see sevhop status, or run: sevhop recover",
        )
    verification.forget()
    reboot_mark.remove_all()
    removed = units.uninstall() | apparmor.uninstall()
    try:
        SCRIPT.unlink()
        removed = True
    except FileNotFoundError:
        pass
    except OSError as err:
        raise SevhopError(f"cannot remove {SCRIPT}: {err.strerror}", "run sevhop as root") from err
    if removed:
        with contextlib.suppress(OSError):
            SCRIPT.parent.rmdir()
    # Last: with the script, but without the module, libvirt could start no domain.
    return selinux.uninstall() | removed


def _reload_daemon() -> None:
    """A daemon that found no hooks when it started looks for them again on SIGHUP."""
    for pid in verification.daemons().values():
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGHUP)
