"""
The labels that images get back from libvirt when it shuts a domain off.

SELinux looks at the label of an open file whenever that is read or written. A guest in the transit uses its images
while libvirt has given them the labels that they had before the domain was started. Which those were is recorded beside
the image, in an extended attribute (``remember_owner`` in qemu.conf; libvirt's src/security/security_util.c).
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from sevhop_qmp import selinux
from sevhop_qmp.errors import ProcessError
from sevhop_qmp.process import QemuProcess

_REMEMBERED = "trusted.libvirt.security.selinux"
_WANTED = {os.O_RDONLY: ("read",), os.O_WRONLY: ("write",), os.O_RDWR: ("read", "write")}


def unusable(process: QemuProcess) -> str:
    """
    Which file that a QEMU has open it could not use when libvirt has given it back; empty if there is none, or nothing
    is enforced.

    :raises ProcessError: it has exited.
    """
    context = selinux.context_in(process.confinement)
    if not context or not selinux.enforcing():
        return ""
    level = context.split(":", 3)[3:]
    for descriptor in process.descriptors():
        path = Path(f"/proc/{process.pid}/fd/{descriptor.number}")
        try:
            mode = os.stat(path).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)) or descriptor.target.startswith("/memfd:"):
                continue
            label = selinux.label_of(path)
            if selinux.type_of(label) == selinux.TYPE or label.split(":", 3)[3:] != level:
                continue  # it is not one that libvirt has labelled for this QEMU alone
        except OSError:
            continue
        before = ""
        with contextlib.suppress(OSError):
            before = os.getxattr(path, _REMEMBERED).rstrip(b"\0").decode(errors="replace")
        if not before:
            return f"libvirt labels {descriptor.target} again when the old QEMU exits, and it is not known how"
        kind = "blk_file" if stat.S_ISBLK(mode) else "file"
        if selinux.allows(context, before, kind, _WANTED.get(_mode(process, descriptor.number), ())) is not True:
            return (
                f"{descriptor.target} gets the label {before} back when the old QEMU exits, and SELinux does not let a "
                "QEMU use that"
            )
    return ""


def _mode(process: QemuProcess, number: int) -> int:
    """How it was opened."""
    with contextlib.suppress(ProcessError, ValueError, KeyError):
        return int(process.descriptor_info(number)["flags"], 8) & os.O_ACCMODE
    return os.O_RDWR
