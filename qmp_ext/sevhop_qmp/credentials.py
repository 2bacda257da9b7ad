"""The user that a process runs as, and what that user may do."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

_CAP_IPC_LOCK = 14
#: What :meth:`Credentials.may` tests: the letters of test(1), and the modes of access(2).
_ACCESS = {"r": os.R_OK, "w": os.W_OK, "x": os.X_OK, "e": os.F_OK}


class Credentials(NamedTuple):
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
        if (self.uid, self.gid) == (os.geteuid(), os.getegid()):
            return all(os.access(path, _ACCESS[letter], effective_ids=True) for letter in access)
        tests = " -a ".join(f"-{letter} {{0}}" for letter in access).split()
        done = subprocess.run(
            [shutil.which("test") or "/usr/bin/test", *(word.format(path) for word in tests)],
            user=self.uid,
            group=self.gid,
            extra_groups=self.groups,
            check=False,
        )
        return done.returncode == 0
