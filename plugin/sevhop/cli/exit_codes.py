"""
Exit codes of the command: what a script, a unit or a fleet's tool acts on.

0 done; 1 refused, nothing was touched; 2 usage; 3 failed and undone, the guest runs where it ran; 4 the guest is paused
and safe, ``sevhop recover`` is needed; 5 the guest ended with its QEMU during the hop.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_REFUSED = 1
EXIT_UNDONE = 3
EXIT_NEEDS_RECOVER = 4
EXIT_LOST = 5

#: By the outcome of a hop; any other is done.
EXIT_OF = {
    "refused": EXIT_REFUSED,
    "undone": EXIT_UNDONE,
    "needs-recover": EXIT_NEEDS_RECOVER,
    "lost": EXIT_LOST,
}
