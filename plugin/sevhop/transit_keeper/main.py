"""
The keeper of a guest that runs in the transit, as a process of its own: see :mod:`sevhop.keeper.main`, of which this is
a variant. It outlives the command that started it, has a supervisor, and the same sockets.
"""

from __future__ import annotations

import sys

from ..keeper import main as keeper
from .server import TransitServer

if __name__ == "__main__":
    sys.exit(keeper.main(TransitServer))
