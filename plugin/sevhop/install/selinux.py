"""
SELinux: whether libvirt's daemon may run the hook. Where it may not, every start of every domain would fail.

The kernel is asked (selinuxfs, security/selinux/selinuxfs.c), so the answer is that of the policy that is loaded, with
the administrator's own modules and file contexts.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from sevhop_qmp.errors import SevhopError

#: Where the kernel has it; without SELinux there is nothing.
KERNEL = Path("/sys/fs/selinux")
#: A daemon that does not run now, in the policies of Fedora and Debian.
_DAEMON = "system_u:system_r:virtd_t:s0"
#: In what the kernel answers: the permissions that are granted, and flags. The first of those means that a domain is
#: permissive (security/selinux/include/security.h: AVD_FLAGS_PERMISSIVE).
_ALLOWED, _FLAGS, _PERMISSIVE = 0, 5, 1


def verify_hook(directory: Path, daemons: Iterable[int]) -> None:
    """
    Verify that libvirt's daemon may run a file that is created in a directory. Without SELinux, or while that enforces
    nothing, this does nothing.

    :param directory: of the hooks; it need not exist.
    :param daemons: their pids; none if no daemon runs.
    :raises SevhopError: it may not.
    """
    if not _enforcing():
        return
    while not directory.exists():
        directory = directory.parent
    ours = _context_of("self")
    label = _ask("create", ours, _label_of(directory), "file")
    if label is None:
        raise SevhopError(f"SELinux does not know the label of files in {directory}", f"run: restorecon -R {directory}")
    for context in [_context_of(pid) for pid in daemons] or [_DAEMON]:
        if not _may_execute(context, label):
            kind = label.split(":")[2]
            raise SevhopError(
                f"SELinux does not let libvirt ({context}) run hooks that are labelled {kind}, as those in {directory} "
                "are, so no domain could be started; nothing was installed",
                f"run: semanage fcontext -a -t bin_t '{directory}(/.*)?' && restorecon -R {directory}, then try again",
            )


def _enforcing() -> bool:
    with contextlib.suppress(OSError):
        return (KERNEL / "enforce").read_text().strip() == "1"
    return False


def _context_of(process: int | str) -> str:
    return Path(f"/proc/{process}/attr/current").read_text().rstrip("\0\n")


def _label_of(path: Path) -> str:
    return os.getxattr(path, "security.selinux").rstrip(b"\0").decode()


def _may_execute(context: str, label: str) -> bool:
    """Whether a process with this context may execute a file with this label, in its own domain or in another one."""
    allowed = _ask("access", context, label, "file")
    if allowed is None:  # there is no such domain in this policy
        return True
    answer = allowed.split()
    granted, flags = int(answer[_ALLOWED], 16), int(answer[_FLAGS], 16)
    wanted = ["execute", "read", "open"]
    if _ask("create", context, label, "process") == context:
        wanted.append("execute_no_trans")
    return bool(flags & _PERMISSIVE) or all(granted & _bit(one) for one in wanted)


def _bit(permission: str) -> int:
    """The bit of a permission on files."""
    return 1 << int((KERNEL / "class" / "file" / "perms" / permission).read_text()) - 1


def _ask(what: str, context: str, target: str, kind: str) -> str | None:
    """One question to the kernel, and its answer; None if it does not know one of the contexts."""
    number = int((KERNEL / "class" / kind / "index").read_text())
    fd = os.open(KERNEL / what, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.write(fd, f"{context} {target} {number}".encode())
        return os.read(fd, 4096).rstrip(b"\0\n").decode()
    except OSError:
        return None
    finally:
        os.close(fd)
