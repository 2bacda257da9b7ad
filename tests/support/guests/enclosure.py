"""
Runs a libvirt daemon of its own, in a mount namespace and a network of its own: run by :mod:`.daemon` through
``unshare --mount --net``.

What libvirt and sevhop keep in fixed places (/run, /etc/libvirt, /var/lib/libvirt ...) is an empty file system here, so
nothing of the host's is seen or touched. This process stays as the subreaper of the QEMUs: libvirt waits until
a QEMU that it has ended is really gone, and not every init reaps at once.

With the argument ``apparmor`` daemon and guests are confined by libvirt's own profiles. The kernel has to load them, so
that is for the lab only.

With ``selinux`` they are confined by SELinux, in a lab that has it (``tools/lab/run --selinux``): what they use gets
the labels that an installed system has, and the policy is enforced until the daemon has ended.

With ``virtqemud=DIRECTORY`` the daemon is libvirt's for QEMU alone, and the others that it asks run beside it.

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
_ENFORCE = Path("/sys/fs/selinux/enforce")
#: The modular daemons that virtqemud asks for networks, pools and so on.
BESIDE = ("virtnetworkd", "virtnodedevd", "virtnwfilterd", "virtsecretd", "virtstoraged")
_MODULAR = "virtqemud="
#: What the service of the daemon would run it as.
_DAEMON = "system_u:system_r:virtd_t:s0-s0:c0.c1023"
#: Labels of the policy's file contexts.
_LABELS = {
    "root_t": ["/"],
    "etc_t": ["/etc", "/etc/passwd", "/etc/group", "/etc/nsswitch.conf"],
    "ld_so_cache_t": ["/etc/ld.so.cache"],
    "usr_t": ["/usr", "/usr/share", "/usr/share/seabios", "/usr/share/qemu"],
    "var_t": ["/var"],
    "var_lib_t": ["/var/lib"],
    "var_log_t": ["/var/log"],
    "bin_t": ["/usr/bin", "/usr/sbin", "/usr/sbin/dmidecode", "/usr/bin/env", "/usr/bin/python3.*", "/usr/bin/cat"],
    "shell_exec_t": ["/bin/bash", "/bin/dash"],
    "virtd_exec_t": ["/usr/sbin/libvirtd"],
    "qemu_exec_t": ["/usr/bin/qemu-system-x86_64", "/var/cache/sevhop/qemu/*/usr/bin/qemu-system-x86_64"],
    "kvm_device_t": ["/dev/sev"],
}
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
    security = next((name for name in ("apparmor", "selinux") if name in sys.argv[1:]), "none")
    Path("/etc/libvirt/qemu.conf").write_text(_CONFIGURATION.format(security=security))
    _own_kvm()
    _own_network()
    _own_authority()
    if security == "apparmor":
        _confine()
    elif security == "selinux":
        _label()
        _ENFORCE.write_text("1")
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

    directories = [Path(word.removeprefix(_MODULAR)) for word in sys.argv[1:] if word.startswith(_MODULAR)]
    program = directories[0] / "virtqemud" if directories else Path(shutil.which("libvirtd") or "/usr/sbin/libvirtd")
    if directories:
        for name in BESIDE:
            _run(program.with_name(name))
    daemon = _start(program, security)
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
                elif security == "selinux":
                    _ENFORCE.write_text("0")
                return 0
            daemon = _start(program, security)


def _start(program: Path, security: str) -> int:
    return _run("runcon", _DAEMON, program) if security == "selinux" else _run(program)


def _run(*words: str | Path) -> int:
    # A daemon with -t would end when it is idle. Its messages repeat what virsh prints.
    return subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid


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


def _label() -> None:
    """As on an installed system. What is not named here has the one label that the lab gives to the machine's files."""
    subprocess.run(["restorecon", "-RF", "/dev", *_OWN], check=True, stdout=subprocess.DEVNULL)
    for kind, paths in _LABELS.items():
        for path in paths:
            for one in Path("/").glob(path[1:]) if "*" in path else [Path(path)]:
                if one.exists():
                    os.setxattr(one.resolve(), "security.selinux", f"system_u:object_r:{kind}:s0".encode() + b"\0")
    # As an administrator does it for directories with images.
    os.setxattr(GUESTS, "security.selinux", b"system_u:object_r:virt_image_t:s0\0")
    # Nothing is left out of the kernel's log of what was denied.
    Path("/proc/sys/kernel/printk_ratelimit").write_text("0")


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
