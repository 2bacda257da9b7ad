"""How long things may take, as far as a user may choose it: ``--help`` has the defaults, and needs no monitor."""

from __future__ import annotations

#: Seconds that an ordinary command may take.
COMMAND_TIMEOUT = 10.0
