"""
The shutdown of the host, where systemd manages it.

libvirt-guests(8) shuts down the guests that libvirt knows, and their scopes are stopped after it. A guest in a transit
has only its keeper for that. So both are stopped after libvirt-guests, and after the service in which an upgrade may be
in progress: first the keeper, which has the guest shut down (:mod:`sevhop.transit_keeper.server`), then the transit.
"""

from __future__ import annotations

import subprocess

from . import systemd

#: Seconds in which systemd must answer.
_TIMEOUT = 5.0
#: If it is killed.
_ATTEMPTS = 5
#: Units that are stopped before the scopes of transits and keepers are. To systemd these are started before those.
BEFORE = ("virt-guest-shutdown.target", "sevhop-upgrade.service")
#: Seconds for a guest to shut down, as with libvirt-guests.
PATIENCE = 300


def in_progress() -> bool:
    """Whether the host is shutting down."""
    if not systemd.manages_host():
        return False
    for _ in range(_ATTEMPTS):
        try:
            done = subprocess.run(
                ["systemctl", "is-system-running"], capture_output=True, text=True, timeout=_TIMEOUT, check=False
            )
        except (OSError, subprocess.SubprocessError):
            return False
        # systemd ends all processes of a scope, and then those that these have started meanwhile: also this one.
        if done.returncode >= 0:
            return done.stdout.strip() == "stopping"
    return False
