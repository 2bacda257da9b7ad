"""Whether libvirt holds leases on the disks of the domains that run (https://libvirt.org/locking.html)."""

from __future__ import annotations

import re
from pathlib import Path

_CONFIGURATION = Path("/etc/libvirt/qemu.conf")
_SETTING = re.compile(r"^\s*lock_manager\s*=\s*[\"'](?P<name>[^\"']*)[\"']", re.MULTILINE)
#: Of the lock managers; one that runs may have been configured when the daemon was started.
_PID_FILES = (Path("/run/virtlockd.pid"), Path("/run/sanlock/sanlock.pid"))


def in_use(configuration: Path = _CONFIGURATION, pid_files: tuple[Path, ...] = _PID_FILES) -> bool:
    """Whether domains have leases: one of those programs is configured, or runs."""
    try:
        text = configuration.read_text(errors="replace")
    except OSError:
        text = ""
    if any(found["name"] not in ("", "nop") for found in _SETTING.finditer(text)):
        return True
    return any(_runs(path) for path in pid_files)


def _runs(pid_file: Path) -> bool:
    try:
        pid = int(pid_file.read_text())
        return Path(f"/proc/{pid}/comm").read_text().strip() == pid_file.stem
    except (OSError, ValueError):
        return False
