"""
Halts itself at an exact moment: ``halting.py PHASE ARGUMENT...`` runs sevhop with these arguments, and stops by SIGSTOP
when that phase is to begin. Nothing of the phase has been done then.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from sevhop.cli import main as command
from sevhop.engine.transaction import Transaction

run_phase = Transaction.run_phase


def main(wanted: str, *arguments: str) -> int:
    """The program."""

    async def halting(transaction: Transaction, name: str, *rest: Any) -> Any:
        if name == wanted:
            os.kill(os.getpid(), signal.SIGSTOP)
        return await run_phase(transaction, name, *rest)

    setattr(Transaction, "run_phase", halting)  # noqa: B010
    return command.main(list(arguments))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
