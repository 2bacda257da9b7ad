"""Runs the scripts that build what the lab is made of."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from .errors import LabError


def run(command: Sequence[str | Path], failure: str) -> None:
    """Run a script, and end it and all that it has started if this process is interrupted.

    :param failure: the error's message.
    :raise LabError: it failed; what it printed is in it.
    """
    builder = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = builder.communicate()
    finally:
        if builder.poll() is None:  # we are interrupted, and so are its compilers
            with suppress(ProcessLookupError):
                os.killpg(builder.pid, signal.SIGTERM)
            builder.wait()
    if builder.returncode:
        raise LabError(failure, output)
