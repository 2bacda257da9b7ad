"""
Has the host not shut down, nor suspend, while a guest is between two QEMUs (systemd-inhibit(1), systemd-logind(8)).

libvirt-guests would not find a guest that is in a transit, and so could not shut it down. An administrator who wants
the shutdown all the same overrides it: ``systemctl reboot --check-inhibitors=no``.
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path

from . import systemd

log = logging.getLogger(__name__)

_PROGRAM = Path("/usr/bin/systemd-inhibit")
#: Seconds.
_PATIENCE = 1.0


@contextlib.contextmanager
def taken(why: str) -> Iterator[None]:
    """
    Take an inhibitor. Nothing happens where systemd does not run; one that is refused is logged. It ends with the last
    process that has been forked meanwhile, however that ends.

    :param why: what users see who want to shut down.
    """
    if not systemd.manages_host():
        yield
        return
    command = [str(_PROGRAM), "--what=shutdown:sleep", "--mode=block", "--who=sevhop", f"--why={why}", "/bin/cat"]
    try:
        # A session of its own: a SIGINT of the terminal is for sevhop, which needs it for the rollback.
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as err:
        log.warning("cannot delay a shutdown: %s", err)
        yield
        return
    try:
        yield
    finally:
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            if status := process.wait(_PATIENCE):
                log.warning("cannot delay a shutdown: %s has exited with status %d", _PROGRAM, status)
        except subprocess.TimeoutExpired:  # a keeper that was forked has it
            log.info("the inhibitor is still there")
