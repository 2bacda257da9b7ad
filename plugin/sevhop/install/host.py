"""
What sevhop puts on a host: one script that libvirt runs; rules, where there is AppArmor; units, where there is systemd.
Installed, removed, and seen to work.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import secrets
import shlex
import signal
import sys
import tempfile
from pathlib import Path
from xml.sax.saxutils import escape

from sevhop_qmp.errors import SevhopError
from sevhop_qmp.process import Credentials

from ..guest import preload
from ..libvirt import hook, hook_server
from ..libvirt.connection import Connection, DomainError
from ..libvirt.save_image import SaveImage
from ..records import journal
from ..records.run_directory import DOMAINS, RUN, make_run_directories
from . import apparmor, atomic_file, units

#: libvirt looks for hooks there, and nowhere else.
HOOKS = Path("/etc/libvirt/hooks")
_SCRIPT = HOOKS / "qemu.d" / "sevhop"
_HERE = Path(__file__).resolve().parent.parent
#: How often the daemon is asked whether it has found the hook.
ATTEMPTS = 20
_PID_FILES = tuple(Path("/run", name) for name in ("libvirtd.pid", "virtqemud.pid"))

#: A domain for the daemon to ask the hook about. It is never started: the hook refuses.
_PROBE = """<domain type='{kind}'>
  <name>{name}</name><memory unit='MiB'>16</memory>
  <os><type arch='x86_64'>hvm</type></os><features><acpi/></features>
  <devices><emulator>{emulator}</emulator><memballoon model='none'/></devices>
  <q:commandline xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'><q:env name='{mark}' value='-'/></q:commandline>
</domain>"""


def install() -> list[Path]:
    """
    Put the script, the rules and the units in place, and have the daemon look for the script.

    :return: the files that are sevhop's or have lines of it.
    :raises SevhopError: one of them cannot be written, or is not accepted.
    """
    rules = apparmor.install()
    text = hook_script()
    # libvirt runs whatever is in the script's own directory.
    atomic_file.write(_SCRIPT, text, 0o755, beside=HOOKS)
    _reload_daemon()
    return [_SCRIPT, *rules, *units.install()]


def hook_script(python: str = sys.executable) -> str:
    """The script, with the paths of the programs that it runs."""
    text = (_HERE / "host" / "qemu.d" / "sevhop").read_text()
    programs = {"@PYTHON@": python, "@HOOK@": hook.__file__, "@CLIENT@": str(hook_server.CLIENT)}
    for mark, path in programs.items():
        text = text.replace(mark, shlex.quote(path))
    return text


def uninstall() -> bool:
    """
    Remove the script, the rules and the units. A directory that is empty then goes with it.

    :return: whether there were any.
    :raises SevhopError: a hop is under way or was broken off, or it cannot be removed.
    """
    if DOMAINS.is_dir() and (under_way := sorted(os.listdir(DOMAINS))):
        raise SevhopError(f"hops are under way: {', '.join(under_way)}", "see sevhop status")
    # Those of guests outside libvirt, and what was broken off.
    for path in journal.journals():
        raise SevhopError(f"there is a hop that is not finished: {path}", "see sevhop status, or run: sevhop recover")
    removed = units.uninstall() | apparmor.uninstall()
    try:
        _SCRIPT.unlink()
    except FileNotFoundError:
        return removed
    except OSError as err:
        raise SevhopError(f"{_SCRIPT} cannot be removed: {err.strerror}", "run sevhop as root") from err
    with contextlib.suppress(OSError):
        _SCRIPT.parent.rmdir()
    return True


def _reload_daemon() -> None:
    """A daemon that found no hooks when it started looks for them again on SIGHUP."""
    for pid in _daemons().values():
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGHUP)


def _daemons() -> dict[str, int]:
    """The daemons that run on this host and may have QEMU domains: program and pid."""
    found = {}
    for path in _PID_FILES:
        with contextlib.suppress(OSError, ValueError):
            pid = int(path.read_text())
            if Path(f"/proc/{pid}/comm").read_text().strip() == path.stem:
                found[path.stem] = pid
    return found


def daemon_name() -> str:
    """The program that is libvirt here: ``libvirtd``, or ``virtqemud`` where it is split into parts."""
    return ", ".join(_daemons()) or "libvirt"


async def see_that_it_is_called() -> None:
    """:raises SevhopError: the daemon does not call the hook."""
    connection = await Connection.open()
    try:
        # A daemon that has just been told looks for hooks a moment later.
        for _ in range(ATTEMPTS):
            if await hook_answers(connection):
                return
            await asyncio.sleep(0.2)
    finally:
        connection.close()
    raise SevhopError("libvirt does not call the hook", "restart the daemon: systemctl restart libvirtd")


async def see_that_qemu_reads_the_library() -> None:
    """:raises SevhopError: the user that the daemon has QEMU run as does not reach what is preloaded into it."""
    connection = await Connection.open()
    try:
        uid, gid = await connection.qemu_user()
    finally:
        connection.close()
    groups: tuple[int, ...] = ()
    with contextlib.suppress(KeyError):
        groups = tuple(os.getgrouplist(pwd.getpwuid(uid).pw_name, gid))
    try:
        preload.see_readable(Credentials(uid, gid, groups, 0))
    except SevhopError as err:
        raise SevhopError(f"the hook is in place, but {err.message}", err.hint) from err


async def hook_answers(connection: Connection) -> bool:
    """
    Whether the daemon runs our hook: it is given the image of a domain that does not exist, which the hook refuses.
    Without the hook the daemon tries to start that domain, which fails since the image is empty.

    :raises DomainError: the daemon has no emulator at all.
    """
    kind, emulator = await connection.default_emulator()
    name = f"sevhop-probe-{secrets.token_hex(8)}"
    xml = _PROBE.format(kind=kind, name=name, emulator=escape(emulator), mark=hook.IMAGE_MARK)
    make_run_directories()
    with tempfile.NamedTemporaryFile(dir=RUN, prefix="probe-") as file:
        SaveImage(xml, False, b"").write(file)  # type: ignore[arg-type]
        try:
            await connection.restore(file.name)
        except DomainError as err:
            return f"sevhop: the keeper of domain {name} is gone" in err.message
    return False
