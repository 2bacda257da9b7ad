"""
Runs a libvirt daemon of its own, in a mount namespace of its own: run by :mod:`.daemon` through ``unshare --mount``.

What libvirt and sevhop keep in fixed places (/run, /etc/libvirt, /var/lib/libvirt ...) is an empty file system here, so
nothing of the host's is seen or touched. This process stays as the subreaper of the QEMUs: libvirt waits until
a QEMU that it has ended is really gone, and not every init reaps at once.

It prints ``ready`` when the daemon may be asked, starts it again when it has died, and ends it when its standard input
ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import grp
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_OWN = ("/etc/libvirt", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt", "/var/lib/sevhop", "/run")
_DIRECTORIES = ("/run/lock", "/run/libvirt", "/etc/libvirt/qemu", "/etc/libvirt/hooks", "/var/lib/libvirt/qemu")
#: For the guests' files; QEMU's user may write there.
GUESTS = Path("/var/lib/libvirt/guests")
#: For programs that stand in for an emulator; only root may write there.
PROGRAMS = Path("/var/lib/libvirt/programs")
_CONFIGURATION = """
security_driver = "none"
cgroup_controllers = []
stdio_handler = "file"
"""


def main() -> int:
    """The process."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for path in _OWN:
        Path(path).mkdir(mode=0o700, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", path], check=True)
    for path in _DIRECTORIES:
        Path(path).mkdir(parents=True)
    GUESTS.mkdir(mode=0o777)
    GUESTS.chmod(0o777)
    PROGRAMS.mkdir(mode=0o755)
    Path("/etc/libvirt/qemu.conf").write_text(_CONFIGURATION)
    _own_kvm()
    # Whoever started us holds the other end of the pipe; when that end is gone, so are we.
    if os.fork() == 0:
        sys.stdin.read()
        os.kill(os.getppid(), signal.SIGTERM)
        os._exit(0)
    # SEV guests have their memory pinned, on the account of QEMU, which inherits the limit.
    with contextlib.suppress(ValueError, PermissionError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    ending = False

    def end(*_: object) -> None:
        nonlocal ending
        ending = True
        os.kill(daemon, signal.SIGTERM)

    daemon = _start()
    signal.signal(signal.SIGTERM, end)
    print("ready", flush=True)
    while True:
        pid, _ = os.wait()
        if pid == daemon:
            if ending:
                _end_the_rest()
                return 0
            daemon = _start()


def _start() -> int:
    # libvirtd -t would end when it is idle. Its messages repeat what virsh says.
    program = shutil.which("libvirtd") or "/usr/sbin/libvirtd"
    return subprocess.Popen([program], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid


def _end_the_rest() -> None:
    """A test that has failed may have left guests, which are our children now that the daemon has gone."""
    with contextlib.suppress(ChildProcessError):
        while True:
            for pid in Path("/proc/self/task", str(os.getpid()), "children").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            os.wait()


def _own_kvm() -> None:
    """libvirt does not run QEMU as root, and /dev/kvm may be root's alone."""
    if Path("/dev/kvm").exists():
        node = Path("/run/kvm")
        os.mknod(node, stat.S_IFCHR | 0o660, os.stat("/dev/kvm").st_rdev)
        node.chmod(0o660)
        os.chown(node, 0, grp.getgrnam("kvm").gr_gid)
        subprocess.run(["mount", "--bind", node, "/dev/kvm"], check=True)


if __name__ == "__main__":
    sys.exit(main())
