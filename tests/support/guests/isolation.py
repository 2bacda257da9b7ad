"""
Whoever runs guests does it in a mount namespace of its own: what sevhop and guests keep in fixed places of a host is
empty there. So neither the host's own hops nor another test run are seen, touched, or taken for something left over.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

_CLONE_NEWNS = 0x00020000  # linux/sched.h; os.unshare comes with Python 3.12
#: Directory -> its mode.
_OWN = {"/run/sevhop": "700", "/var/lib/sevhop": "700", "/dev/shm": "1777"}


def isolate() -> None:
    """
    Put this process, and all that it starts, into such a namespace; without the right to that nothing is done.

    Two runs then share no hop and no recovery of one.
    """
    if os.geteuid() or ctypes.CDLL(None).unshare(_CLONE_NEWNS):
        return
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    for directory, mode in _OWN.items():
        Path(directory).mkdir(mode=int(mode, 8), exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"mode={mode}", "sevhop", directory], check=True)
