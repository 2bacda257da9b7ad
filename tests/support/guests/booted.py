"""
A Debian release that is booted: systemd is its first process, in namespaces of its own.

The kernel is the machine's, as in a container, and so is the boot id. What is written stays from one boot to the next,
in memory, and is thrown away at the end; /run is new with each boot. Of the cgroups there is what no other hierarchy of
the machine has, perhaps no controller at all: processes are sorted, and killed, by them in any case.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from .build import Unavailable
from .release import ENVIRONMENT, Release
from .running import GuestFailed, wait_until

#: Seconds until it is booted, until it is down, and for a command in there.
_BOOT, _DOWN, _TIMEOUT = 90.0, 90.0, 300
#: Where the cgroups of the machine may be that systemd needs (cgroup v2).
_CGROUPS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
#: What only the machine's own systemd would be right to change.
_DROPPED = "-sys_module,-sys_time,-sys_boot,-syslog"
#: The first process, in new namespaces: it replaces what it has of the machine by its own, and becomes systemd.
_INIT = """
umount --recursive --lazy /dev /sys
umount --recursive --lazy /proc
mount -n -t proc -o nosuid,nodev,noexec proc /proc
for path in /proc/sys /proc/sysrq-trigger; do
    [ -e $path ] || continue
    mount --bind $path $path
    mount -o remount,bind,ro $path
done
mount -t sysfs -o nosuid,nodev,noexec sysfs /sys
mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 /sys/fs/cgroup
mount -o remount,bind,ro /sys
mount -t tmpfs -o mode=755,nosuid tmpfs /dev
mkdir /dev/pts /dev/shm /dev/net /dev/mqueue
mount -t devpts -o newinstance,ptmxmode=666,mode=620,gid=5 devpts /dev/pts
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs /dev/shm
ln -s pts/ptmx /dev/ptmx
ln -s /proc/self/fd /dev/fd
ln -s fd/0 /dev/stdin
ln -s fd/1 /dev/stdout
ln -s fd/2 /dev/stderr
for node in null:3 zero:5 full:7 random:8 urandom:9 console:3; do
    mknod -m 666 /dev/${node%:*} c 1 ${node#*:}
done
mknod -m 666 /dev/tty c 5 0
mknod -m 666 /dev/net/tun c 10 200
mknod -m 660 /dev/kvm c 10 232
chgrp kvm /dev/kvm
mount -t tmpfs -o mode=755,nosuid,nodev tmpfs /run
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs /tmp
hostname sevhop-test
exec env --ignore-environment container=sevhop-test setpriv --bounding-set $1 --inh-caps $1 /lib/systemd/systemd
"""
_CONFIGURED = """
mkdir -p /var/log/journal /etc/systemd/system
for unit in getty.target console-getty.service systemd-pstore.service systemd-firstboot.service e2scrub_reap.service \\
    e2scrub_all.timer apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer fstrim.timer logrotate.timer; do
    ln -sf /dev/null /etc/systemd/system/$unit
done
systemd-machine-id-setup >/dev/null 2>&1
"""


class Booted(Release):
    """
    A booted release. :meth:`boot` it, and :meth:`halt` and boot it again as often as wanted; :meth:`stop` it at last.

    :ivar init: of its first process, as it is numbered outside; 0 while it is down.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        super().__init__(process)
        self.init = 0
        self._cgroup: Path | None = None
        self._unshare: subprocess.Popen[bytes] | None = None

    @classmethod
    def start(cls, suite: str, installed: Sequence[str], downloaded: Sequence[str]) -> Self:
        """As :meth:`Release.start`; it is not booted yet, and commands can be run, as in any release."""
        self = super().start(suite, installed, downloaded)
        self.must("sh", "-e", "-c", _CONFIGURED)
        return self

    def boot(self) -> None:
        """
        Boot it, and wait until systemd has started what it is to start.

        :raises Unavailable: that is not possible on this machine.
        """
        self._cgroup = _own_cgroup()
        command = ["nsenter", "--mount", "--target", str(self.pid), "--", *ENVIRONMENT]
        command += ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--ipc", "--uts", "--net", "--cgroup"]
        command += ["--propagation", "private", "sh", "-e", "-c", _INIT, "sh", _DROPPED]
        entered = ["sh", "-c", 'echo $$ >"$0"/cgroup.procs; exec "$@"', str(self._cgroup), *command]
        self._unshare = subprocess.Popen(
            entered, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        )
        children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children")

        def found() -> bool:
            if self._unshare is None or self._unshare.poll() is not None:
                raise Unavailable(f"systemd cannot be booted in a container here: {self._reason()}")
            with contextlib.suppress(OSError, IndexError):
                self.init = int(children.read_text().split()[0])
                return Path(f"/proc/{self.init}/comm").read_text().strip() == "systemd"
            return False

        wait_until(found, _BOOT, "systemd is the first process")
        wait_until(self._has_booted, _BOOT, "systemd has booted")

    def _has_booted(self) -> bool:
        if self._unshare is None or self._unshare.poll() is not None:
            raise GuestFailed("systemd has exited while it booted")
        state = self.entered("systemctl", "is-system-running").stdout.strip()
        return state in ("running", "degraded")

    def _reason(self) -> str:
        assert self._unshare is not None and self._unshare.stderr is not None
        return self._unshare.stderr.read().decode(errors="replace").strip()

    @property
    def up(self) -> bool:
        """Whether its first process exists."""
        return self._unshare is not None and self._unshare.poll() is None

    def power_off(self) -> None:
        """Have systemd stop all units and exit (SIGRTMIN+4, systemd(1)), without a word to logind."""
        os.kill(self.init, signal.SIGRTMIN + 4)
        self.wait_down()

    def crash(self) -> None:
        """End all processes at once; the first one ends with its parent (``--kill-child``)."""
        assert self._unshare is not None
        self._unshare.kill()
        self.wait_down()

    def wait_down(self) -> None:
        """Wait until its first process has exited, and with it all others."""
        assert self._unshare is not None and self._cgroup is not None
        self._unshare.wait(_DOWN)
        assert self._unshare.stderr is not None
        self._unshare.stderr.close()
        self._unshare, self.init = None, 0
        _remove(self._cgroup)

    def stop(self) -> None:
        """Throw it away."""
        if self.up:
            self.crash()
        super().stop()

    @property
    def root(self) -> Path:
        """The file system as it looks in there."""
        return Path(f"/proc/{self.init or self.pid}/root")

    def entered(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command in there, which belongs to no unit."""
        return _run(self.prefix(*command))

    def prefix(self, *command: str | Path) -> list[str]:
        """A command, as it is run from outside in all of its namespaces. Nothing of the environment goes in."""
        names = ("--mount", "--pid", "--ipc", "--uts", "--net", "--cgroup")
        return ["nsenter", *names, "--target", str(self.init), "--", *ENVIRONMENT, *map(str, command)]

    def as_unit(self, *command: str | Path) -> list[str]:
        """A command, as it is run as a unit of its own, with the result and the output of the command."""
        run = ["systemd-run", "--quiet", "--pipe", "--wait", "--collect", "--service-type=exec"]
        return self.prefix(*run, "--", *command)

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command: as a unit, once it is booted."""
        if not self.up:
            return super().run(*command)
        return _run(self.as_unit(*command))

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.entered("systemctl", "show", "--value", f"--property={name}", unit).stdout.strip()

    def processes_of(self, unit: str) -> list[int]:
        """The processes in the cgroup of a unit and below, as they are numbered outside."""
        assert self._cgroup is not None
        group = self.show(unit, "ControlGroup")
        return _processes(self._cgroup / group.lstrip("/")) if group else []

    def unit_of(self, pid: int) -> str:
        """The innermost unit that a process, as it is numbered in there, belongs to; empty if there is none."""
        lines = (self.root / f"proc/{pid}/cgroup").read_text().splitlines()
        group = next((line for line in lines if line.startswith("0::")), "")
        units = [part for part in group.split("/") if part.endswith((".service", ".scope", ".slice"))]
        return units[-1] if units else ""


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT, check=False
    )


def _own_cgroup() -> Path:
    """:raises Unavailable: there is no hierarchy for it."""
    for top in _CGROUPS:
        if (top / "cgroup.controllers").exists():
            group = top / f"sevhop-test-{secrets.token_hex(4)}"
            try:
                group.mkdir()
            except OSError as err:
                raise Unavailable(f"no cgroup can be made: {err.strerror}") from err
            return group
    raise Unavailable("cgroup v2 is not mounted")


def _processes(group: Path) -> list[int]:
    found = []
    for path in group.rglob("cgroup.procs"):
        with contextlib.suppress(OSError):
            found += [int(line) for line in path.read_text().split()]
    return found


def _remove(group: Path) -> None:
    """The kernel lets go of it a moment after the last process has exited."""
    inner = sorted((path for path in group.rglob("*") if path.is_dir()), key=lambda path: -len(path.parts))
    for path in [*inner, group]:
        wait_until(functools.partial(_removed, path), _DOWN, f"{path} is empty")


def _removed(group: Path) -> bool:
    try:
        group.rmdir()
    except OSError:
        return False
    return True
