"""A Debian release of one's own, newly installed each time; thrown away with the process that is its namespace."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from .build import ROOT, fetch
from .running import GuestFailed

_PATIENCE = 30.0
_TIMEOUT = 300
#: What commands in a release get, and nothing else.
ENVIRONMENT = (
    *("env", "--ignore-environment", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"),
    *("LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive"),
)
#: What is written goes to memory; it is all in a mount namespace of its own, and gone with it.
_LAYERS = """
mount -t tmpfs -o mode=755 tmpfs /mnt
mkdir /mnt/upper /mnt/work /mnt/root
mount -t overlay -o "lowerdir=$1,upperdir=/mnt/upper,workdir=/mnt/work" overlay /mnt/root
for directory in dev proc sys; do mount --rbind /$directory /mnt/root/$directory; done
# Not chroot alone: /proc would have paths from outside.
cd /mnt/root
pivot_root . mnt
# Whoever started us holds the other end of the pipe; when that end is gone, so is all this.
exec chroot . sh -c 'umount --lazy /mnt; echo ready; exec cat >/dev/null'
"""


class Release:
    """
    A release in a mount namespace, and commands run in there. The kernel, devices and processes are the machine's.

    :ivar pid: of the process that is its namespace.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.pid = process.pid

    @classmethod
    def start(cls, suite: str, installed: Sequence[str], downloaded: Sequence[str]) -> Self:
        """
        Start one; the first time it is downloaded.

        :param installed: packages that it has.
        :param downloaded: packages that are going to be installed.
        :raises build.Unavailable: it cannot be downloaded.
        """
        directory = fetch([ROOT / "tools" / "fetch-release", suite, *installed, "--", *downloaded])
        command = ["unshare", "--mount", "--propagation", "private", "bash", "-e", "-c", _LAYERS, "bash", directory]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            raise GuestFailed(f"Debian {suite} cannot be entered")
        return cls(process)

    def stop(self) -> None:
        """Throw it away."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(_PATIENCE)

    @property
    def root(self) -> Path:
        """The file system as it looks in there."""
        return Path(f"/proc/{self.pid}/root")

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command in there."""
        return subprocess.run(
            entered(self.pid, *command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
        )

    def must(self, *command: str | Path) -> str:
        """Run a command that must succeed; what it prints."""
        done = self.run(*command)
        if done.returncode:
            raise GuestFailed(f"{' '.join(map(str, command))}: {done.stderr.strip() or done.stdout.strip()[-500:]}")
        return done.stdout

    def install(self, *packages: str | Path) -> None:
        """Install Debian packages, and nothing that they only recommend."""
        self.must("apt-get", "--quiet", "--yes", "--no-install-recommends", "install", *packages)


def entered(pid: int, *command: str | Path) -> list[str]:
    """
    A command, as it is run from outside in a release. Nothing of the environment goes in.

    :param pid: of a process in there.
    """
    return ["nsenter", "--mount", "--net", "--target", str(pid), "--", *ENVIRONMENT, *map(str, command)]
