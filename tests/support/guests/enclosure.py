"""
Runs a libvirt daemon of its own, in a mount namespace and a network of its own: run by :mod:`.daemon` through
``unshare --mount --net``.

What libvirt and sevhop keep in fixed places (/run, /etc/libvirt, /var/lib/libvirt ...) is an empty file system here, so
nothing of the host's is seen or touched. This process stays as the subreaper of the QEMUs: libvirt waits until
a QEMU that it has ended is really gone, and not every init reaps at once.

With the argument ``apparmor`` daemon and guests are confined by libvirt's own profiles. The kernel has to load them, so
that is for the lab only.

It prints ``ready`` when the daemon may be asked, starts it again when it has died, and ends it when its standard input
ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import grp
import os
import resource
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 0x1  # netdevice(7)
_OWN = ("/etc/libvirt", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt", "/var/lib/sevhop", "/run")
_DIRECTORIES = ("/run/lock", "/run/libvirt", "/etc/libvirt/qemu", "/etc/libvirt/hooks", "/var/lib/libvirt/qemu")
#: For the guests' files; QEMU's user may write there.
GUESTS = Path("/var/lib/libvirt/guests")
#: For programs that stand in for an emulator; only root may write there.
PROGRAMS = Path("/var/lib/libvirt/programs")
#: Seconds in which the daemon must have ended. libvirt 11 sometimes takes half a minute.
_GRACE = 5
_CONFIGURATION = """
security_driver = "{security}"
cgroup_controllers = []
stdio_handler = "file"
"""
_APPARMOR = Path("/etc/apparmor.d")
#: Where the kernel's security modules are spoken to.
_SECURITY = Path("/sys/kernel/security")


def main() -> int:
    """The process."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for path in _OWN:
        Path(path).mkdir(mode=0o700, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", path], check=True)
    # What a shared memory device leaves there goes with us.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", "/dev/shm"], check=True)
    for path in _DIRECTORIES:
        Path(path).mkdir(parents=True)
    GUESTS.mkdir(mode=0o777)
    GUESTS.chmod(0o777)
    PROGRAMS.mkdir(mode=0o755)
    security = "apparmor" if "apparmor" in sys.argv[1:] else "none"
    Path("/etc/libvirt/qemu.conf").write_text(_CONFIGURATION.format(security=security))
    _own_kvm()
    _own_network()
    _own_authority()
    if security == "apparmor":
        _confine()
    elif (_SECURITY / "apparmor").exists():
        # Here there is no AppArmor, and so nobody changes the host's profiles.
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", _SECURITY], check=True)
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
        if ending:
            return
        ending = True
        os.kill(daemon, signal.SIGTERM)
        signal.alarm(_GRACE)

    daemon = _start()
    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(daemon, signal.SIGKILL))
    print("ready", flush=True)
    while True:
        pid, _ = os.wait()
        if pid == daemon:
            if ending:
                signal.alarm(0)
                _end_the_rest()
                if security == "apparmor":
                    _profiles("--remove")
                return 0
            daemon = _start()


def _start() -> int:
    # libvirtd -t would end when it is idle. Its messages repeat what virsh prints.
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


def _confine() -> None:
    """Have the kernel load libvirt's profiles, from a copy, in which rules may be changed."""
    copy = Path("/run/apparmor.d")
    shutil.copytree(_APPARMOR, copy, symlinks=True)
    subprocess.run(["mount", "--bind", copy, _APPARMOR], check=True)
    # libvirt has each profile compiled several times, and that takes most of the time in emulation.
    options = Path("/run/parser.conf")
    options.write_text("Optimize=no-expr-simplify\nOptimize=no-minimize\n")
    subprocess.run(["mount", "--bind", options, "/etc/apparmor/parser.conf"], check=True)
    _profiles("--replace", "--skip-cache")


def _profiles(*what: str) -> None:
    """A profile that stays in the kernel would confine the next daemon as well, by its path."""
    for profile in ("usr.lib.libvirt.virt-aa-helper", "usr.sbin.libvirtd"):
        subprocess.run(["apparmor_parser", *what, _APPARMOR / profile], check=True)


def _own_network() -> None:
    """Have /sys show the network cards that are in here; the rest of it stays as it is."""
    sys_here = Path("/run/sys")
    sys_here.mkdir()
    subprocess.run(["mount", "-t", "sysfs", "sysfs", sys_here], check=True)
    for path in ("class/net", "devices/virtual/net"):
        subprocess.run(["mount", "--bind", sys_here / path, Path("/sys") / path], check=True)
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh", b"lo", _IFF_UP))


def _own_authority() -> None:
    """A TPM comes with a log, and the first one with a certificate authority that issues its certificate."""
    for path in (Path("/var/lib/swtpm-localca"), Path("/var/log/swtpm")):
        if path.exists():
            now = path.stat()
            options = f"mode={stat.S_IMODE(now.st_mode):o},uid={now.st_uid},gid={now.st_gid}"
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], check=True)


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
