"""The user that a process runs as, and what that user may do."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_CAP_IPC_LOCK = 14


@dataclass(frozen=True)
class Credentials:
    """What the process runs as. ``capabilities`` is the effective set, as a bit mask."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    umask: int
    capabilities: int = 0

    @property
    def may_lock_memory(self) -> bool:
        """Whether it is exempt from the limit of locked memory."""
        return bool(self.capabilities >> _CAP_IPC_LOCK & 1)

    def may(self, access: str, path: Path) -> bool:
        """
        Whether this user can open or run a file; tested as that user, since directories count as well.

        :param access: letters of ``rwx``; ``e`` for whether this user can reach it at all.
        """
        other = (self.uid, self.gid) != (os.geteuid(), os.getegid())
        tests = " -a ".join(f"-{letter} {{0}}" for letter in access).split()
        done = subprocess.run(
            [shutil.which("test") or "/usr/bin/test", *(word.format(path) for word in tests)],
            user=self.uid if other else None,
            group=self.gid if other else None,
            extra_groups=self.groups if other else None,
            check=False,
        )
        return done.returncode == 0
