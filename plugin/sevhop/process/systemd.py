"""Whether systemd manages this host."""

from __future__ import annotations

from pathlib import Path

#: Exists if it does (sd_booted(3)).
BOOTED = Path("/run/systemd/system")


def manages_host() -> bool:
    """Whether it is the host's first process."""
    return BOOTED.is_dir()
