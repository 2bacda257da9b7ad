"""
Exit codes of the command, for scripts, units and fleet tools.

0 done; 1 refused, nothing was touched; 2 usage; 3 rolled back, the guest is in its old QEMU as before, or where another
client has put it; 4 recovery required, nothing of the guest is lost; 5 the guest is gone. Which state the guest is in
is in the message.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_REFUSED = 1
EXIT_ROLLED_BACK = 3
EXIT_RECOVERY_REQUIRED = 4
EXIT_GUEST_LOST = 5

#: By the outcome of a hop; any other is done.
EXIT_OF = {
    "refused": EXIT_REFUSED,
    "rolled-back": EXIT_ROLLED_BACK,
    "recovery-required": EXIT_RECOVERY_REQUIRED,
    "guest-lost": EXIT_GUEST_LOST,
}
