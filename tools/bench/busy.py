"""A busy host: a loop that never waits for each processor, at the priority of everybody else."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

#: It ends when whoever started it has.
_LOOP = "import os, sys\nwhile os.getppid() == int(sys.argv[1]):\n    for _ in range(10**6):\n        pass"


@contextlib.contextmanager
def busy_loops(wanted: bool) -> Iterator[None]:
    """Keep all processors busy until the end of the context, if that is wanted."""
    with contextlib.ExitStack() as loops:
        for _ in os.sched_getaffinity(0) if wanted else ():
            process = subprocess.Popen([sys.executable, "-c", _LOOP, str(os.getpid())], stdin=subprocess.DEVNULL)
            loops.callback(process.wait)
            loops.callback(process.kill)
        yield
