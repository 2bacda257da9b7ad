"""
That libvirt calls the hook, and that its QEMU can load adopt.so: verified once for each daemon and host, and recorded.

The daemon cannot be asked which hooks it runs, so it is given the save image of a domain that does not exist, which the
hook refuses; libvirt logs that as an error. So this is done by ``sevhop install``, and by the first upgrade with a
daemon for which it was not done. A check only reads the record, and changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import secrets
import sys
import tempfile
from pathlib import Path
from xml.sax.saxutils import escape

from sevhop_qmp.credentials import Credentials
from sevhop_qmp.errors import ProcessError, SevhopError
from sevhop_qmp.process import QemuProcess

from ..guest import preload
from ..libvirt import hook, hook_server
from ..libvirt.connection import Connection
from ..libvirt.daemon import DomainError
from ..libvirt.save_image import SaveImage
from ..records.run_directory import RUN, make_run_directories
from . import atomic_file

#: libvirt looks for hooks there, and nowhere else.
HOOKS = Path("/etc/libvirt/hooks")
SCRIPT = HOOKS / "qemu.d" / "sevhop"
#: Which daemons were seen to call which script.
RECORD = RUN / "hook-verified"
#: How often it is tested whether the daemon has found the hook.
ATTEMPTS = 20
_PID_FILES = tuple(Path("/run", name) for name in ("libvirtd.pid", "virtqemud.pid"))

#: A domain for which the daemon calls the hook. It is never started: the hook refuses.
_PROBE = """<domain type='{kind}'>
  <name>{name}</name><memory unit='MiB'>16</memory>
  <os><type arch='x86_64'>hvm</type></os><features><acpi/></features>
  <devices><emulator>{emulator}</emulator><memballoon model='none'/></devices>
  <q:commandline xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'><q:env name='{mark}' value='-'/></q:commandline>
</domain>"""


def daemons() -> dict[str, int]:
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
    return ", ".join(daemons()) or "libvirt"


def reason_against() -> str:
    """Why the daemon cannot call the hook; empty if nothing is known against it. Nothing is touched."""
    if not SCRIPT.exists():
        return "sevhop's hook is not installed"
    return "" if os.access(SCRIPT, os.X_OK) else f"{SCRIPT} is not executable"


def is_recorded() -> bool:
    """Whether the daemons that run now were seen to call the hook that is installed now."""
    try:
        fd = os.open(RECORD, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, encoding="utf-8") as file:
            return file.read(4096) == _identity()
    except (OSError, UnicodeDecodeError):
        return False


async def ensure_hook(connection: Connection) -> None:
    """
    Verify it unless that was done for this daemon.

    :raises SevhopError: the daemon does not call the hook.
    """
    if not await asyncio.to_thread(is_recorded):
        await verify_hook(connection)


async def verify_hook(connection: Connection, attempts: int = 1) -> None:
    """
    Verify that the daemon calls the hook, and record it.

    :param attempts: how often to try: a daemon handles SIGHUP a moment after it got it.
    :raises SevhopError: it does not.
    """
    for attempt in range(attempts):
        if attempt:
            await asyncio.sleep(0.2)
        try:
            identity = _identity()
        except OSError as err:
            hint = "run sevhop as root" if isinstance(err, PermissionError) else "run: sevhop install"
            raise SevhopError(f"cannot read {err.filename}, a part of the hook: {err.strerror}", hint) from err
        if await _hook_answers(connection):
            with contextlib.suppress(OSError, SevhopError):  # then it is verified again next time
                make_run_directories()
                atomic_file.write(RECORD, identity.encode(), 0o600)
            return
    raise SevhopError("libvirt does not call the hook", "run: sevhop install, or restart the daemon")


def forget() -> None:
    """The hook was removed."""
    with contextlib.suppress(OSError):
        RECORD.unlink()


async def verify_library(connection: Connection) -> None:
    """:raises SevhopError: the user that the daemon runs QEMU as cannot read the library that is preloaded into it."""
    uid, gid = await connection.qemu_user()
    groups: tuple[int, ...] = ()
    with contextlib.suppress(KeyError):
        groups = tuple(os.getgrouplist(pwd.getpwuid(uid).pw_name, gid))
    try:
        preload.verify_readable(Credentials(uid, gid, groups, 0))
    except SevhopError as err:
        raise SevhopError(f"the hook is in place, but {err.message}", err.hint) from err


def _identity() -> str:
    """
    Of the daemons that run, and of what they call. Another one of these is another identity.

    :raises OSError: a part of the hook is missing.
    """
    lines = []
    for path in (SCRIPT, hook.__file__, hook_server.CLIENT, sys.executable):
        found = os.stat(path)
        lines.append(f"{path} {found.st_dev} {found.st_ino} {found.st_mtime_ns}")
    for program, pid in sorted(daemons().items()):
        with contextlib.suppress(ProcessError):
            process = QemuProcess.open(pid)
            lines.append(f"{program} {pid} {process.start_time}")
            process.close()
    return "\n".join(lines)


async def _hook_answers(connection: Connection) -> bool:
    """
    Whether the daemon runs our hook: it gets the save image of a domain that does not exist, which the hook refuses.
    Without the hook the daemon tries to restore that domain, which fails since the image is empty.

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
